//go:build !linux

package content

import (
	"context"
	"os"
	"time"
)

// watch would report changes of files; here nothing does.
type watch struct{}

func newWatch(...*os.File) *watch { return nil }

func (*watch) wait(context.Context, time.Duration) (bool, error) { return false, nil }

func (*watch) close() {}
