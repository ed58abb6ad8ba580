package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// Clone makes what a file holds a reflink of what another one does: both share their blocks until one of them is written to. The
// file keeps what it has behind that. Any error means that it is to be copied: few file systems have reflinks, and only within
// one of them.
func Clone(to, from *os.File) error {
	return retry(func() error { return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) })
}
