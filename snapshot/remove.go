package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Remove deletes a snapshot and its files. FailedPrecondition, naming them, where it has
// children; Unavailable where it is mounted (in this process's mount namespace), or another process
// mounts it, commits it, or makes a child of it.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.Remover().Remove(ctx, key)
}

// A Remover removes snapshots one after the other. It reads the records of all snapshots once. After that it reads only the
// records that are new to it, and those of the children of what it is to remove.
type Remover struct {
	s     *Snapshotter
	known *family // nil until a committed snapshot is removed: no other has children
}

// Remover returns a Remover, for a caller that removes many snapshots.
func (s *Snapshotter) Remover() *Remover { return &Remover{s: s} }

// Remove is [Snapshotter.Remove].
func (r *Remover) Remove(ctx context.Context, key string) error {
	_ = r.s.sweep(ctx)
	if err := retry(func() error { return r.remove(ctx, key) }); err != nil {
		return fmt.Errorf("remove %s: %w", key, err)
	}
	return nil
}

func (r *Remover) remove(ctx context.Context, key string) error {
	e, err := r.s.lookup(key)
	if err != nil {
		return err
	}
	if r.known == nil && e.Kind == Committed {
		known, _, err := r.s.newFamily(ctx, false)
		if err != nil && !errdefs.IsDataLoss(err) {
			return err // without its children no parent may go
		}
		r.known = known
	}
	gone := &removal{entry: e}
	gone.dir, gone.held, gone.failed = r.s.detach(ctx, e, r.known)
	r.s.delete(ctx, []*removal{gone})
	return gone.failed
}

// A family records which snapshots have children, for a caller that asks about many. The parent of a snapshot never changes, with
// one exception: committing can give a parent to an active snapshot that has none.
type family struct {
	next     uint64                     // ids from here on are not known
	children map[uint64]map[uint64]bool // by parent
	orphans  map[uint64]bool            // active snapshots without a parent
}

// newFamily returns the family of all snapshots, and their records. With dryRun it takes no lock, and the family is empty.
// A DataLoss error says which records are damaged, beside the others.
func (s *Snapshotter) newFamily(ctx context.Context, dryRun bool) (*family, []entry, error) {
	k := &family{children: map[uint64]map[uint64]bool{}, orphans: map[uint64]bool{}}
	if !dryRun {
		l, err := s.lock(ctx)
		if err != nil {
			return nil, nil, err
		}
		k.next = l.next
		l.unlock()
	}
	// Every snapshot with an id below next is in the store by now, or gone.
	all, err := s.entries()
	if err != nil {
		err = fmt.Errorf("list snapshots: %w", err)
		if !errdefs.IsDataLoss(err) {
			return nil, nil, err
		}
	}
	for _, e := range all {
		if e.id < k.next {
			k.add(e)
		}
	}
	return k, all, err
}

func (k *family) add(e entry) {
	delete(k.orphans, e.id)
	if len(e.Parents) > 0 {
		of := k.children[e.Parents[0]]
		if of == nil {
			of = map[uint64]bool{}
			k.children[e.Parents[0]] = of
		}
		of[e.id] = true
	} else if e.Kind == Active {
		k.orphans[e.id] = true
	}
}

func (k *family) remove(e entry) {
	if len(e.Parents) > 0 {
		delete(k.children[e.Parents[0]], e.id)
	}
	delete(k.orphans, e.id)
}

// childless returns FailedPrecondition, naming the children, if a committed snapshot has any. The caller holds the store's lock.
// Known children are read again, since other processes may have removed them. Snapshots that are new since the last call, or
// may have been given a parent since, are read too.
func (s *Snapshotter) childless(parent entry, known *family, l *lock) error {
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
	var names []string
	for id := range known.children[parent.id] {
		e, err := s.read(id)
		if errors.Is(err, fs.ErrNotExist) {
			delete(known.children[parent.id], id)
			continue
		}
		if err != nil {
			return err
		}
		name := e.Key
		if e.Namespace != "" && e.Namespace != s.namespace {
			name += " (namespace " + e.Namespace + ")"
		}
		names = append(names, name)
	}
	if len(names) > 0 {
		slices.Sort(names)
		return errdefs.ErrFailedPrecondition.WithMessage("it has children, remove them first: " + strings.Join(names, ", "))
	}
	return nil
}
