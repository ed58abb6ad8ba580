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
	seen := map[inode]bool{}
	// below is the directory of base that at stands for, -1 without one.
	var walk func(at, below int, name string) error
	walk = func(at, below int, name string) error {
		st, err := lstat(at, name)
		if err != nil {
			return err
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if !isDir && st.Nlink > 1 {
			if seen[inodeOf(&st)] {
				return nil
			}
			seen[inodeOf(&st)] = true
		}
		same := false
		if below != -1 {
			was, err := lstat(below, name)
			same = err == nil && was.Ino == st.Ino && was.Ctim == st.Ctim
		}
		if !same {
			size += st.Blocks * 512
			inodes++
		}
		if !isDir {
			return nil
		}
		return descend(ctx, at, below, name, walk)
	}
	st, err := lstat(unix.AT_FDCWD, dir)
	if err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	size, inodes = st.Blocks*512, 1
	d, err := openDir(unix.AT_FDCWD, dir)
	if err != nil {
		return 0, 0, err
	}
	defer d.Close()
	below := -1
	if base != "" {
		b, err := openDir(unix.AT_FDCWD, base)
		if err != nil {
			return 0, 0, err
		}
		defer b.Close()
		below = int(b.Fd())
	}
	err = eachPresent(d, func(name string) error { return walk(int(d.Fd()), below, name) })
	return size, inodes, err
}

func descend(ctx context.Context, at, below int, name string, walk func(at, below int, name string) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d, err := openDir(at, name)
	if err != nil {
		return err
	}
	defer d.Close()
	if below != -1 {
		b, err := openDir(below, name)
		below = -1
		if err == nil {
			defer b.Close()
			below = int(b.Fd())
		}
	}
	return eachPresent(d, func(name string) error { return walk(int(d.Fd()), below, name) })
}

// eachPresent is each for a tree that changes meanwhile.
func eachPresent(d *os.File, f func(name string) error) error {
	return each(d, func(name string) error {
		if err := f(name); !errors.Is(err, unix.ENOENT) {
			return err
		}
		return nil
	})
}

func each(d *os.File, f func(name string) error) error {
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := f(name); err != nil {
			return err
		}
	}
	return nil
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
