package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sort"
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
		if err := s.sweep(); err != nil {
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
	sort.SliceStable(all, func(i, j int) bool { return len(all[i].Parents) > len(all[j].Parents) })
	for _, e := range all {
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
			continue
		}
		if !o.DryRun {
			failed, err := s.sweepEntry(ctx, e, known, o)
			if err = cmp.Or(err, ctx.Err()); err != nil {
				return err
			}
			switch {
			case errors.Is(failed, errChanged), errors.Is(failed, errNeeded), errors.Is(failed, fs.ErrNotExist), errdefs.IsUnavailable(failed), errdefs.IsFailedPrecondition(failed):
				continue
			case failed != nil:
				o.Failed(fmt.Errorf("remove %s: %w", e.Key, failed))
				continue
			}
		}
		if err := f(e.Info, u); err != nil {
			return err
		}
	}
	return nil
}

// sweepEntry removes a snapshot unless it has come to be needed. A parent of one that is needed has a child, and stays for that.
// failed is why this one stays; err is an error of Alone itself.
func (s *Snapshotter) sweepEntry(ctx context.Context, e entry, known *family, o Sweep) (failed, err error) {
	var dir string
	var held *os.File
	err = o.Alone(func(needed func(string, Info) bool) error {
		if needed(e.Namespace, e.Info) || e.Kind != Committed && s.stacking(e) {
			failed = errNeeded
		} else {
			dir, held, failed = s.detach(ctx, e, known)
		}
		return nil
	})
	if failed == nil && held != nil {
		failed = s.delete(e, dir, held)
	}
	return failed, err
}
