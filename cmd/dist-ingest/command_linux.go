package main

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeSize is the most that an ordinary user's pipe may hold.
const pipeSize = 1 << 20

// widen makes room in a pipe, so that its two processes wait less for each other. Where that
// is refused, as to who has many, it is as it was.
func widen(p *os.File) {
	if c, err := p.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
}

// tie has the kernel end the command if we are killed: a command that writes nothing would not
// notice. The kernel goes by the thread, which must stay until untie.
func tie(c *exec.Cmd) (untie func()) {
	runtime.LockOSThread()
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	return runtime.UnlockOSThread
}
