package content

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// flock takes an exclusive lock, waiting for it or failing with EWOULDBLOCK. The kernel
// gives it up when the process dies. Descriptors conflict also within one process.
func flock(f *os.File, wait bool) error {
	if !wait {
		return flockHow(f, unix.LOCK_EX|unix.LOCK_NB)
	}
	return flockHow(f, unix.LOCK_EX)
}

func flockHow(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// flockContext waits for the lock, LOCK_EX or LOCK_SH, until ctx is done, and owns f if it
// fails.
func flockContext(ctx context.Context, f *os.File, how int) error {
	err := flockHow(f, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		got := make(chan error, 1)
		go func() { got <- flockHow(f, how) }()
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

// unflock releases the lock even where a child between fork and exec still shares f.
func unflock(f *os.File) { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// locked tells whether somebody holds f's lock, without keeping it.
func locked(f *os.File) bool {
	err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		unflock(f)
	}
	return errors.Is(err, unix.EWOULDBLOCK)
}

// sameFile tells whether path still names the open file.
func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}
