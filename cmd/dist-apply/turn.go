package main

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"distkit/disk"
)

// windowLock is the environment variable that names a file to lock while a large zstd window is in use.
const windowLock = "DIST_WINDOW_LOCK"

// turn waits for the lock of [windowLock]. It is nil where there is none.
func turn() func(context.Context) (over func(), err error) {
	name := os.Getenv(windowLock)
	if name == "" {
		return nil
	}
	return func(ctx context.Context) (func(), error) {
		f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			err = disk.LockContext(ctx, f, unix.LOCK_EX)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", windowLock, err)
		}
		return func() { disk.Release(f) }, nil
	}
}
