package main

import (
	"os/exec"
	"runtime"
	"syscall"
)

// tie has the kernel end the command if we are killed: a command that writes nothing would not
// notice. The kernel goes by the thread, which must stay until untie.
func tie(c *exec.Cmd) (untie func()) {
	runtime.LockOSThread()
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	return runtime.UnlockOSThread
}
