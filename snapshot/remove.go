package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/events"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Remove deletes a snapshot and its files. FailedPrecondition: it has children, which the error names. Unavailable: it
// is mounted in this process's mount namespace, or another process is mounting it, committing it or preparing from it.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.Remover().Remove(ctx, key)
}

// A Remover removes snapshots one after the other. It reads the records of all snapshots once. Later it reads only new
// records, and those of the children of a snapshot to be removed.
type Remover struct {
	s     *Snapshotter
	known *family // nil until a committed snapshot is removed; no other kind has children
}

// Remover returns a Remover, for a caller that removes many snapshots.
func (s *Snapshotter) Remover() *Remover { return &Remover{s: s} }

// Remove is like [Snapshotter.Remove].
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
			return err // the children of a parent must be known before it is removed
		}
		r.known = known
	}
	gone := &removal{entry: e}
	gone.dir, gone.held, gone.failed = r.s.detach(ctx, e, r.known)
	r.s.delete(ctx, []*removal{gone})
	return gone.failed
}

// A family records which snapshots have children, for a caller that asks about many of them. A snapshot's parent never
// changes, with one exception: committing can give a parent to an active snapshot that has none.
type family struct {
	next     uint64                     // snapshots with this id or a higher one are not recorded yet
	children map[uint64]map[uint64]bool // by parent
	orphans  map[uint64]bool            // active snapshots without a parent
}

// newFamily returns the family of all snapshots, and their records. With dryRun it takes no lock, and the family is
// empty. Damaged records are reported with a DataLoss error, beside the others.
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
	// All ids below next are published by now, or gone.
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

// childless returns FailedPrecondition, naming the children, if a committed snapshot has any. The caller holds the
// store's lock. Recorded children are read again, since other processes may have removed them. Snapshots that are new
// since the last call, or that may have got a parent since, are read as well.
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

// delete deletes the files of detached snapshots, none of which may be another's parent. If ctx is done, the files stay
// in tmp/ for the next sweep.
func (s *Snapshotter) delete(ctx context.Context, list []*removal) {
	// Sync the loss of the names first. A name that reappears after a power failure would be a snapshot with files
	// missing. That matters only for committed snapshots: the files of others are not durable anyway.
	var unsynced error
	if slices.ContainsFunc(list, func(r *removal) bool { return r.held != nil && r.Kind == Committed }) {
		unsynced = s.syncDir(s.dir, filepath.Join(s.dir, "tmp"))
	}
	for _, r := range list {
		if r.held == nil {
			continue
		}
		if r.Kind == Committed {
			r.failed = unsynced
		}
		if r.failed == nil {
			step("detached")
			s.log(r.record, events.Event{Topic: "/snapshot/remove", Key: r.Key})
			if ctx.Err() == nil {
				r.failed = ofOthers(s.removeFiles(ctx, r.dir))
			}
		}
		disk.Release(r.held)
	}
}

// ofOthers explains a failure to read or delete files that other users own. It affects root without capabilities, too. The rest
// of a removed snapshot stays in tmp/ until somebody who can delete it sweeps.
func ofOthers(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return errdefs.ErrPermissionDenied.WithMessage("it has files of other users, which root can read and delete, or an ordinary user by dist-userns -- COMMAND (a whole store: dist-userns -- rm -rf DIR)")
	}
	return err
}

// detach removes a snapshot's name and leaves its directory, locked, in tmp/. It fails like childless if the snapshot
// has children. known may be nil for a snapshot that is not committed, since only committed ones have children.
func (s *Snapshotter) detach(ctx context.Context, e entry, known *family) (string, *os.File, error) {
	held, err := s.lockSnapshot(e, unix.LOCK_EX)
	if err != nil {
		return "", nil, err
	}
	detached := false
	defer func() {
		if !detached {
			disk.Release(held)
		}
	}()
	l, err := s.lock(ctx)
	if err != nil {
		return "", nil, err
	}
	defer l.unlock()
	is, err := s.read(e.id)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(is.raw, e.raw) {
		return "", nil, errChanged
	}
	if err != nil {
		return "", nil, err
	}
	if e.Kind == Committed {
		// Children are checked before mounts: mounting a child also counts as mounting its parent.
		if err := s.childless(e, known, l); err != nil {
			return "", nil, err
		}
	}
	if err := s.checkUnmounted(e); err != nil {
		return "", nil, err
	}
	step("not mounted")
	dir := filepath.Join(s.dir, "tmp", filepath.Base(s.dirOf(e.id)))
	if err := os.Rename(s.dirOf(e.id), dir); err != nil {
		return "", nil, err
	}
	detached = true
	if known != nil {
		known.remove(e)
	}
	step("renamed away")
	s.unindex(e.Namespace, e.Key)
	return dir, held, nil
}
