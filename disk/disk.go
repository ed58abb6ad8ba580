// Package disk has the file operations that a store needs which processes share and which must survive a crash.
//
// It has four parts:
//
//   - [Tree] is a directory with untrusted content. Its methods (Open, Create, Rename, RemoveAll, …) resolve names
//     without following symbolic links, never wait for a FIFO, and read no more than the caller's limit.
//   - Locks ([LockFile], [Tree.LockFile], [LockContext]) are flock(2) locks on files that other processes may replace
//     while the caller waits. [Busy] and [WithNotice] name the process that holds a lock.
//   - Durability: [Tree.Replace] writes a new file, syncs and renames it. [SyncDir] and [MakeDir] make directory
//     entries durable.
//   - Helpers for streams: [Clone], [StartWriteback], [WidenPipe], and [Piped] for the output of a command.
//
// Package layout, below this one, keeps the files of an OCI image layout. Package sys wraps single system calls, and
// package program runs helper programs.
//
// Functions return the errors of their system calls, mostly as *fs.PathError. Three kinds have a class of
// github.com/containerd/errdefs: FailedPrecondition for a file of an unexpected kind or size, Unavailable for a lock
// that another process holds, and NotImplemented for a file system without locks.
package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// SyncDir waits until a directory's entries are on disk. It returns nil on a file system that can't sync directories.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return syncDir(d)
}

func syncDir(d *os.File) error {
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return nil
}

// MakeDir is os.MkdirAll with mode 0777 less the umask. When it returns, the entry of each new directory is on disk.
func MakeDir(dir string) error {
	err := os.Mkdir(dir, 0o777)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MakeDir(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o777)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return SyncDir(filepath.Dir(dir))
}

// Replace is [Tree.Replace] for a file whose directory is trusted.
func Replace(name string, b []byte, perm fs.FileMode, durable bool) error {
	return Tree(filepath.Dir(name)).Replace(filepath.Base(name), b, perm, durable)
}

// PrivateDir creates dir with mode 0700 unless it exists. It reports whether dir is a directory that only this user can
// enter, and whose parent lets no other user put another directory in its place.
func PrivateDir(dir string) bool {
	var parent, st unix.Stat_t
	uid := uint32(os.Geteuid())
	if unix.Stat(filepath.Dir(dir), &parent) != nil || parent.Uid != uid && parent.Uid != 0 ||
		parent.Mode&0o022 != 0 && parent.Mode&unix.S_ISVTX == 0 {
		return false
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return false
	}
	return unix.Lstat(dir, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Uid == uid && st.Mode&0o077 == 0
}
