package disk

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeRoom is the most that an ordinary user's pipe may hold.
const pipeRoom = 1 << 20

// WidenPipe makes room in a pipe, so that its two processes wait less for each other. If the kernel refuses, as it does to a user
// who has many pipes, the pipe stays as it was.
func WidenPipe(pipe syscall.Conn) {
	if c, err := pipe.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeRoom) })
	}
}
