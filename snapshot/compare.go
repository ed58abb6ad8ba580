package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"distkit/disk"
	"distkit/disk/sys"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A Comparison holds the trees needed to compare a snapshot with its parent. Until Close, the snapshot can't be
// committed or removed.
type Comparison struct {
	// Upper is the snapshot's own directory. With Overlay it holds only the changes, in overlayfs's form, else the
	// whole tree.
	Upper   *os.File
	Overlay bool
	// Lower is the parent's tree, or nil if there is no parent.
	Lower *os.File

	held *os.File
}

// Compare opens an active or committed snapshot for comparison with its parent. FailedPrecondition: the snapshot is a
// view, which has no changes.
func (s *Snapshotter) Compare(_ context.Context, key string) (c *Comparison, err error) {
	if err := retry(func() error { c, err = s.compare(key); return err }); err != nil {
		return nil, fmt.Errorf("compare %s: %w", key, err)
	}
	return c, nil
}

func (s *Snapshotter) compare(key string) (*Comparison, error) {
	e, err := s.lookupIntact(key)
	if err != nil {
		return nil, err
	}
	if e.Kind == View {
		return nil, errdefs.ErrFailedPrecondition.WithMessage("it is a view: it changes nothing")
	}
	_, archives := s.driver.(Archiver)
	archived := archives && e.Kind == Committed
	c := &Comparison{Overlay: s.driver.Whiteouts(s.dir) != "" && !archived}
	if c.held, err = s.lockSnapshot(e, unix.LOCK_SH); err != nil {
		return nil, err
	}
	t := s.tree(e.id, e.record)
	if archived {
		c.Upper, err = s.driver.Open(Tree{Dir: t.Dir, Kind: View, Parents: append([]string{t.Dir}, t.Parents...)})
	} else {
		c.Upper, err = OpenFiles(t.FS())
	}
	if err == nil && len(t.Parents) > 0 {
		below := t
		below.Kind = View
		c.Lower, err = s.driver.Open(below)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Close closes the directories and unlocks the snapshot.
func (c *Comparison) Close() {
	for _, f := range []*os.File{c.Upper, c.Lower} {
		if f != nil {
			_ = f.Close()
		}
	}
	disk.Release(c.held)
}

// InLower reports whether the parent has a file at a clean relative path.
func (c *Comparison) InLower(name string) (bool, error) {
	fd, ok, err := c.openLower(name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if ok {
		_ = unix.Close(fd)
	}
	return ok, err
}

// LowerNames lists the names in a directory of the parent, given by its clean relative path. The list is empty if the
// parent has no such directory.
func (c *Comparison) LowerNames(dir string) ([]string, error) {
	fd, ok, err := c.openLower(dir, sys.OpenDir)
	if !ok {
		return nil, err
	}
	defer unix.Close(fd)
	return sys.Names(fd)
}

// openLower opens a file of the parent. ok is false if the parent has no such file.
func (c *Comparison) openLower(name string, flags int) (fd int, ok bool, err error) {
	if c.Lower == nil {
		return -1, false, nil
	}
	fd, err = sys.OpenBeneath(int(c.Lower.Fd()), name, flags, 0)
	switch {
	case err == nil:
		return fd, true, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return -1, false, nil
	}
	return -1, false, &os.PathError{Op: "open", Path: name, Err: err}
}
