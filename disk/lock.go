package disk

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Lock takes the lock of an open file, unix.LOCK_EX or LOCK_SH; with LOCK_NB it fails with EWOULDBLOCK instead of
// waiting. The kernel gives a lock up when the last process that shares the open file has ended. Two open files of one
// process exclude each other as well.
func Lock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Unlock gives it up also where a child between fork and exec still shares the file.
func Unlock(f *os.File) { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// Release is Unlock, and closes the file.
func Release(f *os.File) {
	Unlock(f)
	_ = f.Close()
}

// LockContext waits for the lock until ctx is done. It owns f where it fails.
func LockContext(ctx context.Context, f *os.File, how int) error {
	err := Lock(f, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		got := make(chan error, 1)
		go func() { got <- Lock(f, how) }()
		select {
		case err = <-got:
		case <-ctx.Done():
			// A wait in the kernel can't be called off: what it brings is given back.
			go func() { <-got; _ = f.Close() }()
			return ctx.Err()
		}
	}
	if err != nil {
		_ = f.Close()
	}
	return err
}

// LockFile opens and locks a file or directory that others may replace or remove: what it returns is what the name leads
// to. A symbolic link is not followed, and a FIFO is not waited for.
func LockFile(name string, flag int, perm fs.FileMode, how int) (*os.File, error) {
	return lockNamed(
		func() (*os.File, error) { return os.OpenFile(name, flag|openFlags, perm) },
		func(f *os.File) bool { return Names(name, f) },
		func(f *os.File) error { return lockOrClose(f, how) })
}

func lockOrClose(f *os.File, how int) error {
	err := Lock(f, how)
	if err != nil {
		_ = f.Close()
	}
	return err
}

// lockNamed opens a file and locks it, again if the name has come to lead to another one meanwhile. lock owns the file where it
// fails.
func lockNamed(open func() (*os.File, error), named func(*os.File) bool, lock func(*os.File) error) (*os.File, error) {
	for {
		f, err := open()
		if err != nil {
			return nil, err
		}
		if err := lock(f); err != nil {
			return nil, err
		}
		if named(f) {
			return f, nil
		}
		_ = f.Close()
	}
}

// Names tells whether a name still leads to the open file.
func Names(name string, f *os.File) bool {
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(name)
	return err == nil && os.SameFile(opened, named)
}
