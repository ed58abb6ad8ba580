package disk

import (
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// noOpenat2 is set once the kernel, or a filter of system calls in front of it, is seen to lack openat2(2).
var noOpenat2 atomic.Bool

// openBeneath opens the directory of a relative path with one system call. It follows no symbolic link. ok is false if the call
// fails, whatever the reason: the caller opens one component after the other, and so finds out which one is at fault.
func openBeneath(dir int, name string) (fd int, ok bool) {
	if noOpenat2.Load() {
		return -1, false
	}
	err := retry(func() (err error) {
		fd, err = unix.Openat2(dir, name, &unix.OpenHow{
			Flags:   unix.O_RDONLY | unix.O_DIRECTORY | openFlags,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		return err
	})
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		noOpenat2.Store(true)
	}
	return fd, err == nil
}
