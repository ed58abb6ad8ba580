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
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	return nil
}

// MakeDir is os.MkdirAll with each new directory's entry on disk.
func MakeDir(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MakeDir(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o755)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return SyncDir(filepath.Dir(dir))
}

// Replace lets a name lead to new content, by a file that is written aside as NAME.new and renamed: who opens the
// name has the old or the new. The caller has the lock that keeps others from it. Where it is to be durable it is
// on disk, name and all, when Replace returns.
func Replace(name string, b []byte, perm fs.FileMode, durable bool) error {
	aside := name + ".new"
	// What a crash left there could be anything.
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(aside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && durable {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(aside, name)
	}
	if err != nil {
		_ = os.Remove(aside)
		return err
	}
	if durable {
		return SyncDir(filepath.Dir(name))
	}
	return nil
}
