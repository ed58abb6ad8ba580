package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"distkit/disk"
)

// windowLock is the environment variable with the file to lock while a large zstd window is in use.
const windowLock = "DIST_WINDOW_LOCK"

// turn returns a function that waits for the lock of [windowLock], or nil if the variable is not set. A process that
// can't open the file, for example in another user or mount namespace, continues without the lock, which only saves
// memory.
func turn() func(context.Context) (over func(), err error) {
	name := os.Getenv(windowLock)
	if name == "" {
		return nil
	}
	return func(ctx context.Context) (func(), error) {
		f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
			return func() {}, nil
		}
		if err == nil {
			err = disk.LockContext(ctx, f, unix.LOCK_EX)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", windowLock, err)
		}
		return func() { disk.Release(f) }, nil
	}
}
