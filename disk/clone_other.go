//go:build !linux

package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// Clone is implemented on Linux only.
func Clone(_, _ *os.File) error { return unix.ENOTSUP }
