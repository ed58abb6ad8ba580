package main

import (
	"os/exec"
	"runtime"
	"syscall"
)

// tie makes the kernel kill the command if this process is killed: a command that writes nothing would not notice. The
// kernel watches the thread, which must exist until untie.
func tie(c *exec.Cmd) (untie func()) {
	runtime.LockOSThread()
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	return runtime.UnlockOSThread
}
