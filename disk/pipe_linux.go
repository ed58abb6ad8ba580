package disk

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeRoom is the default limit for an unprivileged user's pipe (/proc/sys/fs/pipe-max-size).
const pipeRoom = 1 << 20

// WidenPipe makes a pipe hold more, so that its two processes wait less for each other. Without effect if pipe is no
// pipe, or if the system refuses, as it does for a user who has many large pipes.
func WidenPipe(pipe syscall.Conn) {
	if c, err := pipe.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeRoom) })
	}
}
