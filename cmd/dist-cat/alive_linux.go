package main

import "golang.org/x/sys/unix"

// alive returns a function that reports whether the process is still running. A later process with the same ID does not
// count.
func alive(pid int) func() bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return exists(pid) // no such process, or a kernel without pidfd_open
	}
	return func() bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return n == 0 || err != nil
	}
}
