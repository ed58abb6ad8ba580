// Package disk is what files need that processes share and that are to outlive a crash: locks that count, names
// that appear whole, and directories whose entries are on disk. What it returns are the errors of the system calls.
package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// SyncDir waits until a directory's entries are on disk, where its file system can tell.
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

// MakeDir is os.MkdirAll, with mode 0777 less the umask, and with each new directory's entry on disk.
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

// Replace is [Tree.Replace] of a file in a directory that is trusted.
func Replace(name string, b []byte, perm fs.FileMode, durable bool) error {
	return Tree(filepath.Dir(name)).Replace(filepath.Base(name), b, perm, durable)
}

// PrivateDir makes a directory, or finds that it is this user's alone, and that nobody else can put another in its
// place. It reports whether that is so.
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
