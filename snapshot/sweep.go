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

// TemporaryLabel marks an active snapshot or a view that is worth nothing once the process is
// gone that made it. Its value says what made it.
const TemporaryLabel = "distkit.temporary"

// Sweep deletes what can be made again and nothing needs: committed snapshots that all namespaces
// share, whose names are digests, and what bears [TemporaryLabel].
type Sweep struct {
	Before time.Time // what was made or changed later stays
	DryRun bool      // report, and delete nothing
	// Alone calls a function while nobody can begin to use a snapshot. The function gets another one, which tells whether a
	// snapshot of a namespace ("" where all share it) must stay. What lies below one that stays, stays too.
	Alone func(func(needed func(namespace string, i Info) bool) error) error
	// Failed is called with the reason why something can't be deleted: the sweep goes on.
	Failed func(error)
}

// chunk is how many snapshots one call of Alone looks at.
const chunk = 512

// errNeeded is why a snapshot isn't deleted that was free before.
var errNeeded = errors.New("it is needed")

// Sweep calls f with every snapshot once it is deleted, or would be, children before their
// parents. What is mounted, or has got a child meanwhile, or is just being filled by
// [Snapshotter.Stack], stays. A snapshot's name goes in a function that is handed to Alone; its size is found out before, and its
// files are deleted after it.
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

// batch is how many snapshots lose their names at once: so many are open, and one sync of the directory is for all.
const batch = 64

// removal is a snapshot that is to be deleted.
type removal struct {
	entry
	usage  Usage
	dir    string   // where its files are once it has lost its name
	held   *os.File // their lock
	failed error    // why it is not deleted
}

// sweepAlike deletes snapshots with equally many parents, of which none is another's, unless they have come to be needed. A parent of
// one that is needed has a child, and stays for that.
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
			// Its files could not be deleted, either. Any other failure to measure is a size of nothing.
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
		case r.held == nil && (errdefs.IsUnavailable(failed) || errdefs.IsFailedPrecondition(failed)): // it is in use
		case ctx.Err() != nil && errors.Is(failed, ctx.Err()):
		default:
			o.Failed(fmt.Errorf("remove %s: %w", r.Key, failed))
		}
	}
	return cmp.Or(alone, ctx.Err())
}
