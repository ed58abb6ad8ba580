//go:build !linux

package main

import (
	"context"
	"time"

	"distkit/image"
)

// sweepSnapshots does nothing: there are none here.
func sweepSnapshots(string, time.Time, bool, func(any, ...any) error) func(context.Context, image.Needed) error {
	return nil
}
