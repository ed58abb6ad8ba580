// Package tree copies, measures and deletes trees of files that nobody can be trusted to
// have made: no symlink in them is followed and no mount in them entered.
package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"distkit/disk/sys"

	"golang.org/x/sys/unix"
)

// openDir opens a directory below another one, or name itself with AT_FDCWD.
func openDir(at int, name string) (*os.File, error) {
	var fd int
	var err error
	if at == unix.AT_FDCWD {
		fd, err = sys.Open(name, sys.OpenDir, 0)
	} else {
		fd, err = sys.OpenBeneath(at, name, sys.OpenDir, unix.RESOLVE_NO_XDEV)
	}
	if errors.Is(err, unix.EXDEV) {
		err = sys.ErrMounted
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func lstat(at int, name string) (st unix.Stat_t, err error) {
	err = sys.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode { return inode{st.Dev, st.Ino} }

// Usage adds up the bytes allocated to a tree and its inodes, the root's included and each
// counted once.
func Usage(ctx context.Context, dir string) (size, inodes int64, err error) {
	return usage(ctx, dir, "")
}

// UsageBeyond is Usage without the files that base has too, unchanged, where dir began as a
// snapshot that keeps inode numbers and change times.
func UsageBeyond(ctx context.Context, dir, base string) (size, inodes int64, err error) {
	return usage(ctx, dir, base)
}

func usage(ctx context.Context, dir, base string) (size, inodes int64, err error) {
	st, err := lstat(unix.AT_FDCWD, dir)
	if err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	size, inodes = st.Blocks*512, 1
	// was follows is through base. Where base lacks a directory, was stays behind.
	var is, was trail
	defer is.close()
	defer was.close()
	if err := is.down(dir); err != nil {
		return 0, 0, err
	}
	if base != "" {
		if err := was.down(base); err != nil {
			return 0, 0, err
		}
	}
	seen := map[inode]bool{}
	for len(is) > 0 {
		inBase := len(was) == len(is)
		name, ok := is.next()
		if !ok {
			if inBase {
				err = was.up()
			}
			if err = errors.Join(err, is.up(), ctx.Err()); err != nil {
				return 0, 0, err
			}
			continue
		}
		st, err := lstat(is.fd(), name)
		if errors.Is(err, unix.ENOENT) {
			continue // removed meanwhile
		}
		if err != nil {
			return 0, 0, &os.PathError{Op: "stat", Path: name, Err: err}
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if !isDir && st.Nlink > 1 {
			if seen[inodeOf(&st)] {
				continue
			}
			seen[inodeOf(&st)] = true
		}
		same := false
		if inBase {
			old, err := lstat(was.fd(), name)
			same = err == nil && old.Ino == st.Ino && old.Ctim == st.Ctim
		}
		if !same {
			size += st.Blocks * 512
			inodes++
		}
		if !isDir {
			continue
		}
		if err := is.down(name); err != nil && !errors.Is(err, unix.ENOENT) {
			return 0, 0, err
		} else if err == nil && inBase {
			_ = was.down(name)
		}
	}
	return size, inodes, nil
}

// maxOpen is how many directories above each other are open at a time.
const maxOpen = 64

// A trail is the directories from the top of a tree down to one of them, each with the names in it that are left to visit. At
// most maxOpen of them are open, however deep the tree is.
type trail []level

type level struct {
	dir   *os.File // nil if it was closed
	id    inode
	names []string
}

func (t trail) last() *level { return &t[len(t)-1] }
func (t trail) fd() int      { return int(t.last().dir.Fd()) }

// next returns a name of the last directory, if one is left.
func (t trail) next() (name string, ok bool) {
	l := t.last()
	if len(l.names) == 0 {
		return "", false
	}
	name, l.names = l.names[0], l.names[1:]
	return name, true
}

// down goes on to a directory in the last one. Of an empty trail it is the top.
func (t *trail) down(name string) error {
	at := unix.AT_FDCWD
	if len(*t) > 0 {
		at = t.fd()
	}
	d, err := openDir(at, name)
	if err != nil {
		return err
	}
	st, err := fstat(d)
	if err == nil {
		var names []string
		if names, err = d.Readdirnames(-1); err == nil {
			*t = append(*t, level{d, inodeOf(&st), names})
		}
	}
	if err != nil {
		d.Close()
		return err
	}
	if n := len(*t) - 1 - maxOpen; n >= 0 {
		(*t)[n].dir.Close()
		(*t)[n].dir = nil
	}
	return nil
}

// up goes back to the directory above the last one. That one is opened again by the name "..", unless it is open.
func (t *trail) up() error {
	from := t.last().dir
	defer from.Close()
	*t = (*t)[:len(*t)-1]
	if len(*t) == 0 || t.last().dir != nil {
		return nil
	}
	fd, err := sys.Openat(int(from.Fd()), "..", sys.OpenDir, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "..", Err: err}
	}
	t.last().dir = os.NewFile(uintptr(fd), "..")
	st, err := fstat(t.last().dir)
	if err == nil && inodeOf(&st) != t.last().id {
		err = errors.New("a directory was moved meanwhile")
	}
	return err
}

func (t *trail) close() {
	for _, l := range *t {
		if l.dir != nil {
			l.dir.Close()
		}
	}
}

// Remove deletes a tree, whatever the modes of its directories. A tree that isn't there is
// success. Nothing that is mounted in it is touched: that is an error.
func Remove(dir string) error {
	parent, err := openDir(unix.AT_FDCWD, filepath.Dir(dir))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err == nil {
		defer parent.Close()
		err = sys.RemoveAll(int(parent.Fd()), filepath.Base(dir))
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", dir, err)
	}
	return nil
}
