// Package tree copies, measures and deletes trees of files made by untrusted users. It never follows a symbolic link in
// a tree and never enters a mount.
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

// openDir opens a directory without following a symbolic link.
func openDir(name string) (*os.File, error) {
	fd, err := sys.Open(name, sys.OpenDir, 0)
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

// Usage returns the bytes allocated to a tree and the number of its inodes, including the root's. Each inode is counted
// once.
func Usage(ctx context.Context, dir string) (size, inodes int64, err error) {
	return usage(ctx, dir, "")
}

// UsageBeyond is Usage without the files that are unchanged from base. dir must have begun as a snapshot of base that
// keeps inode numbers and change times.
func UsageBeyond(ctx context.Context, dir, base string) (size, inodes int64, err error) {
	return usage(ctx, dir, base)
}

func usage(ctx context.Context, dir, base string) (size, inodes int64, err error) {
	st, err := lstat(unix.AT_FDCWD, dir)
	if err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	size, inodes = st.Blocks*512, 1
	is, err := sys.NewTrail(unix.AT_FDCWD, dir)
	defer func() { is.Close() }()
	if err != nil {
		return 0, 0, err
	}
	// was follows the same path through base. Where base has no such directory, was stays in the last common one.
	var was sys.Trail
	defer func() { was.Close() }()
	if base != "" {
		if was, err = sys.NewTrail(unix.AT_FDCWD, base); err != nil {
			return 0, 0, err
		}
	}
	seen := map[inode]bool{}
	for len(is) > 0 {
		inBase := len(was) == len(is)
		name, err := is.Next()
		if err != nil {
			return 0, 0, err
		}
		if name == "" {
			if inBase {
				err = was.Up()
			}
			if err = errors.Join(err, is.Up(), ctx.Err()); err != nil {
				return 0, 0, err
			}
			continue
		}
		st, err := lstat(is.FD(), name)
		if errors.Is(err, unix.ENOENT) {
			continue // deleted in the meantime
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
			old, err := lstat(was.FD(), name)
			same = err == nil && old.Ino == st.Ino && old.Ctim == st.Ctim
		}
		if !same {
			size += st.Blocks * 512
			inodes++
		}
		if !isDir {
			continue
		}
		if err := is.Down(name); err != nil && !errors.Is(err, unix.ENOENT) {
			return 0, 0, err
		} else if err == nil && inBase {
			_ = was.Down(name)
		}
	}
	return size, inodes, nil
}

// Remove deletes a tree, whatever the modes of its directories. If there is no such tree it succeeds. A mount in the
// tree is an error, and its files are not touched.
func Remove(dir string) error {
	parent, err := openDir(filepath.Dir(dir))
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
