//go:build !linux

package main

import (
	"context"
	"time"

	"distkit/image"
)

// sweepSnapshots does nothing: snapshots exist only on Linux.
func sweepSnapshots(string, time.Time, bool, func(driver, key string, size int64, updated time.Time) error, func(error)) func(context.Context, func(func(image.Needed) error) error) error {
	return nil
}
