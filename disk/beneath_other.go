//go:build !linux

package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// openBeneath is implemented on Linux only.
func openBeneath(int, string) (fd int, ok bool) { return -1, false }

// removeAll removes name and everything below it. It holds one file open per level.
func removeAll(dir int, name string) error {
	err := retry(func() error { return unix.Unlinkat(dir, name, 0) })
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	fd, oerr := openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(oerr, fs.ErrNotExist) {
		return nil
	}
	if oerr != nil {
		return err
	}
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	for {
		entries, err := d.ReadDir(256)
		for _, e := range entries {
			if err := removeAll(fd, e.Name()); err != nil {
				return err
			}
		}
		if err == io.EOF || errors.Is(err, fs.ErrNotExist) { // ErrNotExist: another process removed the directory
			break
		}
		if err != nil {
			return Cause(err)
		}
	}
	err = retry(func() error { return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR) })
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
