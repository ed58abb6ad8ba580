package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

// TemporaryLabel marks an active snapshot or a view that is of no use once the process that made it has exited. The
// value tells what made it.
const TemporaryLabel = "distkit.temporary"

// Sweep configures [Snapshotter.Sweep]. It deletes snapshots that can be made again and that nothing needs: committed
// ones that all namespaces share (their names are digests), and those with [TemporaryLabel].
type Sweep struct {
	Before time.Time // keep what was made or changed later
	DryRun bool      // report, but delete nothing
	// Alone calls a function at a time when nobody can start to use a snapshot. It passes a function that reports
	// whether a snapshot of a namespace ("" for a shared one) must be kept. The ancestors of a kept snapshot are kept
	// too.
	Alone func(func(needed func(namespace string, i Info) bool) error) error
	// Failed is called with the reason if something can't be deleted. The sweep then continues.
	Failed func(error)
}

// chunk is the number of snapshots handled in one call of Alone.
const chunk = 512

// errNeeded reports that a snapshot has come to be needed during the sweep.
var errNeeded = errors.New("it is needed")

// Sweep deletes snapshots, children before their parents, and calls f with each. With DryRun it only calls f. It keeps
// a snapshot that is mounted, that has got a child in the meantime, or that [Snapshotter.Stack] is filling. A snapshot
// loses its name within a call of Alone. Its size is measured before, and its files are deleted afterwards.
func (s *Snapshotter) Sweep(ctx context.Context, o Sweep, f func(Info, Usage) error) error {
	if !o.DryRun {
		if err := s.sweep(ctx); err != nil {
			o.Failed(err)
		}
		s.sweepLocks()
	}
	known, all, err := s.newFamily(ctx, o.DryRun)
	if errdefs.IsDataLoss(err) {
		o.Failed(err)
	} else if err != nil {
		return err
	}
	stays := map[uint64]bool{}
	for some := range slices.Chunk(all, chunk) {
		err := o.Alone(func(needed func(string, Info) bool) error {
			for _, e := range some {
				free := e.Kind == Committed && e.Namespace == "" || e.Kind != Committed && e.Labels[TemporaryLabel] != "" && !s.stacking(e)
				stays[e.id] = !free || needed(e.Namespace, e.Info) || !e.Updated.Before(o.Before)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for _, e := range all {
		if stays[e.id] {
			for _, below := range e.Parents {
				stays[below] = true
			}
		}
	}
	all = slices.DeleteFunc(all, func(e entry) bool { return stays[e.id] })
	slices.SortStableFunc(all, func(a, b entry) int { return len(b.Parents) - len(a.Parents) })
	for len(all) > 0 {
		n := 1
		for n < min(len(all), batch) && len(all[n].Parents) == len(all[0].Parents) {
			n++
		}
		if err := s.sweepAlike(ctx, all[:n], stays, known, o, f); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// batch is the number of snapshots that lose their names together. So many directories are open at a time, and they
// share one sync.
const batch = 64

// removal is a snapshot to be deleted.
type removal struct {
	entry
	usage  Usage
	dir    string   // where its files are after it has lost its name
	held   *os.File // the lock on its files
	failed error    // why it was not deleted
}

// sweepAlike deletes snapshots that have equally many ancestors, so that none is the parent of another. It keeps those
// that have come to be needed. The parent of a kept snapshot has a child, and is kept for that.
func (s *Snapshotter) sweepAlike(ctx context.Context, some []entry, stays map[uint64]bool, known *family, o Sweep, f func(Info, Usage) error) error {
	var list []*removal
	var alone error
	for _, e := range some {
		if stays[e.id] {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		u, err := s.driver.Usage(ctx, s.tree(e.id, e.record))
		if err = ofOthers(err); errdefs.IsPermissionDenied(err) {
			// Without permission, the files could not be deleted either. After any other error the size is reported as
			// zero.
			o.Failed(fmt.Errorf("remove %s: %w", e.Key, err))
			for _, below := range e.Parents {
				stays[below] = true
			}
			continue
		}
		list = append(list, &removal{entry: e, usage: u})
	}
	if !o.DryRun && len(list) > 0 {
		err := o.Alone(func(needed func(string, Info) bool) error {
			for _, r := range list {
				if needed(r.Namespace, r.Info) || r.Kind != Committed && s.stacking(r.entry) {
					r.failed = errNeeded
				} else {
					r.dir, r.held, r.failed = s.detach(ctx, r.entry, known)
				}
			}
			return nil
		})
		s.delete(ctx, list)
		if err != nil {
			list = slices.DeleteFunc(list, func(r *removal) bool { return r.held == nil })
			alone = err
		}
	}
	for _, r := range list {
		switch failed := r.failed; {
		case failed == nil:
			if err := f(r.Info, r.usage); err != nil {
				return err
			}
		case errors.Is(failed, errChanged), errors.Is(failed, errNeeded), errors.Is(failed, fs.ErrNotExist):
		case r.held == nil && (errdefs.IsUnavailable(failed) || errdefs.IsFailedPrecondition(failed)): // in use: no failure
		case ctx.Err() != nil && errors.Is(failed, ctx.Err()):
		default:
			o.Failed(fmt.Errorf("remove %s: %w", r.Key, failed))
		}
	}
	return cmp.Or(alone, ctx.Err())
}
