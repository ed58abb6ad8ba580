//go:build !linux

package main

import (
	"context"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/image"
)

// sweepSnapshots does nothing: there are none here.
func sweepSnapshots(string, time.Time, bool, *cli.Records) func(context.Context, image.Needed) error {
	return nil
}
