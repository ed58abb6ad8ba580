package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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
}

// chunk is how many snapshots are looked at in one call of Alone.
const chunk = 512

// errNeeded is why a snapshot isn't deleted that was free before.
var errNeeded = errors.New("it is needed")

// Sweep calls f with every snapshot once it is deleted, or would be, children before their
// parents. What is mounted, or has got a child meanwhile, or is just being filled by
// [Snapshotter.Stack], stays. A snapshot's name goes in a function that is handed to Alone; its size is found out before, and its
// files are deleted after it.
func (s *Snapshotter) Sweep(ctx context.Context, o Sweep, f func(Info, Usage) error) error {
	if !o.DryRun {
		s.sweep()
		s.sweepLocks()
	}
	known, err := s.newFamily(ctx, o.DryRun)
	if err != nil {
		return err
	}
	all, err := s.entries()
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	for _, e := range all {
		if e.id < known.next {
			known.add(e)
		}
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
		if err = ofOthers(err); err == nil && !o.DryRun {
			err = s.sweepEntry(ctx, e, known, o)
		}
		switch {
		case errors.Is(err, errChanged), errors.Is(err, errNeeded), errors.Is(err, fs.ErrNotExist), errdefs.IsUnavailable(err), errdefs.IsFailedPrecondition(err):
			continue
		case err != nil:
			return fmt.Errorf("remove %s: %w", e.Key, err)
		}
		if err := f(e.Info, u); err != nil {
			return err
		}
	}
	return nil
}

// sweepEntry removes a snapshot unless it has come to be needed. A parent of one that is needed has a child, and stays for that.
func (s *Snapshotter) sweepEntry(ctx context.Context, e entry, known *family, o Sweep) error {
	var dir string
	var held *os.File
	err := o.Alone(func(needed func(string, Info) bool) (err error) {
		if needed(e.Namespace, e.Info) || e.Kind != Committed && s.stacking(e) {
			return errNeeded
		}
		dir, held, err = s.detach(ctx, e, func(l *lock) error { return s.childlessNow(e, known, l) })
		return err
	})
	if err != nil {
		return err
	}
	known.remove(e)
	return s.delete(e, dir, held)
}

// family is which snapshots have children, for who asks of many. A parent never changes, but for that of an active snapshot
// without one: committing gives it one.
type family struct {
	next     uint64 // ids from here on are not known
	children map[uint64]int
	orphans  map[uint64]bool // active ones without a parent
}

// newFamily knows nobody yet. When it returns, whoever has an id below next is in the store, or is gone.
func (s *Snapshotter) newFamily(ctx context.Context, dryRun bool) (*family, error) {
	k := &family{children: map[uint64]int{}, orphans: map[uint64]bool{}}
	if dryRun {
		return k, nil
	}
	l, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer l.unlock()
	k.next = l.next
	return k, nil
}

func (k *family) add(e entry) {
	delete(k.orphans, e.id)
	if len(e.Parents) > 0 {
		k.children[e.Parents[0]]++
	} else if e.Kind == Active {
		k.orphans[e.id] = true
	}
}

func (k *family) remove(e entry) {
	if len(e.Parents) > 0 {
		k.children[e.Parents[0]]--
	}
	delete(k.orphans, e.id)
}

// childlessNow is childless under the store's lock. It reads only the records that may have come, or been given a parent, since it
// was called last.
func (s *Snapshotter) childlessNow(parent entry, known *family, l *lock) error {
	ids := slices.Collect(maps.Keys(known.orphans))
	for id := known.next; id < l.next; id++ {
		ids = append(ids, id)
	}
	for _, id := range ids {
		e, err := s.read(id)
		if errors.Is(err, fs.ErrNotExist) {
			delete(known.orphans, id)
			continue
		}
		if err != nil {
			return err
		}
		known.add(e)
	}
	known.next = l.next
	if known.children[parent.id] == 0 {
		return nil
	}
	return s.childless(parent) // it may be that another process has removed them
}
