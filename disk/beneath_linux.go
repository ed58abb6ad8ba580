package disk

import (
	"golang.org/x/sys/unix"

	"distkit/disk/sys"
)

// openBeneath opens the directory at a relative path in one system call, without following symbolic links. ok is false
// if that failed for any reason. The caller then opens one component at a time, which shows the one at fault.
func openBeneath(dir int, name string) (fd int, ok bool) {
	fd, err := sys.OpenBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|openFlags, 0)
	return fd, err == nil
}

// removeAll removes name and everything below it. The number of open files is bounded, however deep the tree is.
func removeAll(dir int, name string) error { return sys.RemoveAll(dir, name) }
