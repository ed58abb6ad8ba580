package disk

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeRoom is the most that an ordinary user's pipe may hold.
const pipeRoom = 1 << 20

// WidenPipe makes a pipe hold more, so that its two processes wait less for each other. The pipe stays as it was if the system
// refuses that, as it does to a user who has many large ones. What is not a pipe stays as it is, too.
func WidenPipe(pipe syscall.Conn) {
	if c, err := pipe.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeRoom) })
	}
}
