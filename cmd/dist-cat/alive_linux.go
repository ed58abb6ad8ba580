package main

import "golang.org/x/sys/unix"

// alive returns a function that reports whether a process, and no later one of the same ID, still runs.
func alive(pid int) func() bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return exists(pid) // there is none, or the kernel has no pidfd_open
	}
	return func() bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return n == 0 || err != nil
	}
}
