package snapshot

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/events"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Commit turns the active snapshot key into a committed snapshot called name. It is atomic: at every instant, one of
// the two exists. It is durable: the files are on disk before the name appears. With [CommitOptions.Settle] it first
// completes the layer on top of its parent.
//
// AlreadyExists: the name is in use; the active snapshot is kept. NotFound: there is no such key. InvalidArgument: it
// is a view. Unavailable: it is mounted in this process's mount namespace (but see [CommitOptions.Mounted]), or another
// process is mounting, committing or removing it. A later write through such a mount would change the committed
// snapshot.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, o CommitOptions) error {
	if err := retry(func() error { return s.commit(ctx, name, key, &o) }); err != nil {
		return fmt.Errorf("commit %s: %w", name, err)
	}
	return nil
}

// errChanged reports that another process changed or removed the snapshot first. The caller retries.
var errChanged = errors.New("changed meanwhile")

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, errChanged) {
			return err
		}
	}
}

// unsettled is a file in a snapshot's directory that exists while the layer is being settled.
const unsettled = "unsettled"

// settle lets the driver settle the layer. It must not be called again after a failure.
func (s *Snapshotter) settle(ctx context.Context, t Tree, unresolved io.Reader) error {
	if err := disk.Tree(t.Dir).WriteFile(unsettled, nil, 0o600); err != nil {
		return err
	}
	step("settle begins")
	if err := s.driver.Settle(ctx, t, unresolved); err != nil {
		return err
	}
	step("settled")
	return os.Remove(filepath.Join(t.Dir, unsettled))
}

func (s *Snapshotter) commit(ctx context.Context, name, key string, o *CommitOptions) error {
	c, err := s.prepareCommit(ctx, name, key, o, nil)
	if err != nil {
		return err
	}
	defer c.release()
	if err := s.sync(); err != nil {
		return fmt.Errorf("sync %s: %w", key, err)
	}
	return s.publishCommit(ctx, c)
}

// A commitment is an active snapshot, locked and settled, that can be committed after its files have been synced.
type commitment struct {
	entry
	to        record       // its record as a committed snapshot
	below     *commitment  // its parent, if that is committed in the same batch
	checkName func() error // returns AlreadyExists if the name is in use
	held      []*os.File   // locks on the snapshot and its parent
}

func (c *commitment) release() {
	for _, f := range c.held {
		disk.Release(f)
	}
	c.held = nil
}

// prepareCommit locks the snapshot key, checks that it can be committed as name, and settles it. below is its parent, if that
// is still to be committed, else nil.
func (s *Snapshotter) prepareCommit(ctx context.Context, name, key string, o *CommitOptions, below *commitment) (_ *commitment, err error) {
	if err := errors.Join(checkKey("name", name), checkLabels(o.Labels)); err != nil {
		return nil, err
	}
	e, err := s.lookup(key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	if err := s.intact(); err != nil {
		return nil, err
	}
	if e.Kind != Active {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s is not active (%s)", key, e.Kind))
	}
	held, err := s.lockSnapshot(e, unix.LOCK_EX)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	c := &commitment{entry: e, to: e.record, below: below, held: []*os.File{held}}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	if is, err := s.read(e.id); err != nil || !bytes.Equal(is.raw, e.raw) {
		return nil, cmp.Or(err, errChanged)
	}
	if !o.Mounted {
		if err := s.checkUnmounted(e); err != nil {
			return nil, fmt.Errorf("%s: %w: unmount it first", key, err)
		}
	}
	if isDigest(name) {
		c.to.Namespace = ""
	}
	c.checkName = func() error {
		if name != key {
			return s.checkAbsent(name)
		}
		if c.to.Namespace != e.Namespace {
			if _, err := s.lookupIn(c.to.Namespace, name); !errors.Is(err, fs.ErrNotExist) {
				return cmp.Or(err, taken(Committed))
			}
		}
		return nil
	}
	if err := c.checkName(); err != nil {
		return nil, err
	}
	if o.Settle != nil && e.Parent != "" {
		return nil, errdefs.ErrFailedPrecondition.WithMessage(key + " was prepared from a parent: there is nothing to settle")
	}
	c.to.Info = Info{Key: name, Kind: Committed, Parent: e.Parent, Labels: compact(o.Labels)}
	if err := s.setParent(ctx, c, o.Parent); err != nil {
		return nil, err
	}
	if err := s.completeFiles(ctx, c, o); err != nil {
		return nil, err
	}
	return c, nil
}

// setParent gives c the parent that its snapshot was prepared without, and locks it. It does nothing if parent is "".
func (s *Snapshotter) setParent(ctx context.Context, c *commitment, parent string) error {
	switch {
	case parent == "" || parent == c.Parent:
		return nil
	case c.Parent != "":
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf("%s was prepared from %s, not from %s", c.Key, c.Parent, parent))
	case s.driver.Whiteouts(s.dir) == "":
		return errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf("%s can't give a snapshot a parent when it is committed", s.driver.Name()))
	}
	c.to.Parent = parent
	if c.below != nil {
		c.to.Parents = append([]uint64{c.below.id}, c.below.to.Parents...)
		return s.mountable(parent, c.to.Parents)
	}
	parents, held, err := s.holdParent(ctx, parent)
	if err != nil {
		return err
	}
	c.to.Parents = parents
	c.held = append(c.held, held)
	return nil
}

// completeFiles makes the files of c what they are to stay: it settles the layer, and has an Archiver make the archive.
func (s *Snapshotter) completeFiles(ctx context.Context, c *commitment, o *CommitOptions) error {
	if _, err := os.Lstat(filepath.Join(s.dirOf(c.id), unsettled)); err == nil {
		return errdefs.ErrFailedPrecondition.WithMessage(c.Key + " could not be settled: apply the layer again, on its mounted parent")
	}
	if o.Settle != nil {
		if err := s.settle(ctx, s.tree(c.id, c.to), o.Settle); err != nil {
			return fmt.Errorf("settle %s: %w", c.Key, err)
		}
		o.Settle = nil
	}
	if a, ok := s.driver.(Archiver); ok {
		if err := a.Archive(ctx, s.tree(c.id, c.record), s.options.Diff); err != nil {
			return fmt.Errorf("archive %s: %w", c.Key, err)
		}
		step("archived")
	}
	return nil
}

// sync writes the files of all snapshots to disk.
func (s *Snapshotter) sync() error {
	if s.noSync {
		return nil
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return sys.Syncfs(int(d.Fd()))
}

// publishCommit replaces the record of a snapshot whose files have been synced. FailedPrecondition: its parent is no
// longer the one it was settled on.
func (s *Snapshotter) publishCommit(ctx context.Context, c *commitment) error {
	step("synced")
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.below != nil {
		below, held, err := s.holdParent(ctx, c.to.Parent)
		if err != nil {
			return err
		}
		c.held = append(c.held, held)
		if !slices.Equal(below, c.to.Parents) {
			return errdefs.ErrFailedPrecondition.WithMessage("parent " + c.to.Parent + " was made by another process meanwhile")
		}
	}
	err := s.replace(ctx, c.entry, c.to, func() error {
		if err := c.checkName(); err != nil || c.to.Key == c.Key && c.to.Namespace == c.Namespace {
			return err
		}
		return s.index(c.to.Namespace, c.to.Key, c.id)
	})
	if err == nil {
		s.log(c.to, events.Event{Topic: "/snapshot/commit", Key: c.Key, Name: c.to.Key, Parent: c.to.Parent})
		if a, ok := s.driver.(Archiver); ok {
			_ = a.Committed(s.tree(c.id, c.to)) // a failure leaves files that are deleted with the snapshot
		}
	}
	return err
}

// replace replaces e's record by r, unless another process has changed it. The new record is written and synced under
// another name. check is called under the lock, just before the rename.
func (s *Snapshotter) replace(ctx context.Context, e entry, r record, check func() error) error {
	dir, held, err := s.scratch(ctx)
	if err != nil {
		return err
	}
	defer disk.Release(held)
	defer os.RemoveAll(dir)
	r.Updated = now()
	if r.Created.IsZero() {
		r.Created = r.Updated
	}
	if err := disk.Tree(dir).Create("info", encode(r), 0o600, !s.noSync); err != nil {
		return err
	}
	step("record written")
	if err := func() error {
		l, err := s.lock(ctx)
		if err != nil {
			return err
		}
		defer l.unlock()
		is, err := s.read(e.id)
		if err != nil || !bytes.Equal(is.raw, e.raw) {
			return errChanged
		}
		if err := check(); err != nil {
			return err
		}
		step("indexed")
		if err := os.Rename(filepath.Join(dir, "info"), filepath.Join(s.dirOf(e.id), "info")); err != nil {
			return err
		}
		step("renamed")
		if r.Key != e.Key || r.Namespace != e.Namespace {
			s.unindex(e.Namespace, e.Key)
		}
		return nil
	}(); err != nil {
		return err
	}
	return s.syncDir(s.dirOf(e.id))
}
