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

// windowLock is the environment variable that names a file to lock while a large zstd window is in use.
const windowLock = "DIST_WINDOW_LOCK"

// turn waits for the lock of [windowLock]. It is nil where there is none. A process that can't reach the file, as one in another user
// or mount namespace, goes on without: the lock only saves memory.
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
