package runtime

import (
	"context"
	"errors"
	"os"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// adopt is a shim's work for a process that has lost its monitor, and is no child of this one.
func (u *execution) adopt(interactive bool, tell func(report)) error {
	ctx := context.Background()
	fd, err := u.state.open()
	if err != nil {
		tell(report{Error: err.Error(), Exit: 125})
		return err
	}
	defer unix.Close(fd)
	// What the process prints it prints to pipes, which it keeps open itself. A terminal went with
	// the monitor that had it.
	s, err := u.c.openStreams(u.place(), u.job.Terminal, interactive, &u.state)
	if err != nil {
		tell(report{Error: err.Error(), Exit: 125, Denied: errdefs.IsPermissionDenied(err)})
		return err
	}
	if u.state.Monitor, err = Identify(os.Getpid()); err == nil {
		err = u.place().writeState(u.state)
	}
	if err != nil {
		tell(report{Error: err.Error(), Exit: 125})
		return err
	}
	s.begin()
	tell(report{Pid: u.state.Pid})
	e := waitForeign(u.state.Process, fd)
	return u.finish(ctx, s, e)
}

// waitForeign waits for the end of a process that is no child. What it exited with stands in /proc
// until its parent has waited for it, and from then on a new kernel tells it whoever has a descriptor of it.
func waitForeign(p Process, fd int) Exit {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	e := Exit{Exited: time.Now().UTC()}
	for range 100 {
		status, ok := zombieStatus(p)
		if !ok {
			status, ok = exitStatus(fd)
		}
		if ok {
			e.Status = &status
			return e
		}
		time.Sleep(10 * time.Millisecond)
	}
	e.Error = "its first monitor was killed, and this kernel tells nobody else what it exited with"
	return e
}

// pidfdInfo is the kernel's struct pidfd_info in its first version.
type pidfdInfo struct {
	mask, cgroup uint64
	ids          [11]uint32
	exitCode     int32
}

// exitStatus asks with which status a process has ended (Linux 6.15).
func exitStatus(fd int) (status int, ok bool) {
	const getInfo, exit = 0xc040ff0b, 1 << 3 // PIDFD_GET_INFO, PIDFD_INFO_EXIT
	info := pidfdInfo{mask: exit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.mask&exit == 0 {
		return 0, false
	}
	return statusOf(unix.WaitStatus(info.exitCode)), true
}

// zombieStatus reads the status of a process that has ended and was not waited for.
func zombieStatus(p Process) (status int, ok bool) {
	s, err := statOf(p.Pid)
	return statusOf(unix.WaitStatus(s.code)), err == nil && s.state == 'Z' && s.start == p.Start
}

// statusOf is what a process exited with, or 128+n where signal n ended it.
func statusOf(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
