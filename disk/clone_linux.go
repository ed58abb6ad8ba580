package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// Clone turns the beginning of one file into a reflink of another file, from: both share blocks until one of them is changed. What the
// first file holds beyond the length of from stays. On any error the caller copies instead: few file systems have reflinks, and no
// reflink crosses file systems.
func Clone(to, from *os.File) error {
	return retry(func() error { return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) })
}
