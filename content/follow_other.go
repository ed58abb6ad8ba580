//go:build !linux

package content

import (
	"context"
	"os"
	"time"
)

// watch is implemented on Linux only; newWatch returns nil here.
type watch struct{}

func newWatch(...*os.File) *watch { return nil }

func (*watch) wait(context.Context, time.Duration) (bool, error) { return false, nil }

func (*watch) close() {}
