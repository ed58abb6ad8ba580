package disk

import (
	"golang.org/x/sys/unix"

	"distkit/disk/sys"
)

// openBeneath opens the directory of a relative path, and follows no symbolic link. ok is false if that fails, whatever the reason:
// the caller opens one component after the other, and so finds out which one is at fault.
func openBeneath(dir int, name string) (fd int, ok bool) {
	fd, err := sys.OpenBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|openFlags, 0)
	return fd, err == nil
}

// removeAll removes a name with all that is below it, with few files open, however deep that is.
func removeAll(dir int, name string) error { return sys.RemoveAll(dir, name) }
