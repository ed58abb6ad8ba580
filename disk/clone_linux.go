package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// Clone makes the content of a file a reflink of another file's: the two share blocks until one of them is written to. If to is
// longer, the rest of it stays. Any error means that the content has to be copied: few file systems have reflinks, and none has
// them to another file system.
func Clone(to, from *os.File) error {
	return retry(func() error { return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) })
}
