package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"distkit/errclass"

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
	s, err := u.streams(interactive).Adopt(u.state.Pipes, u.state.findPipe)
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
	s.Begin()
	tell(report{Pid: u.state.Pid})
	e := waitForeign(u.state.Process, fd)
	return u.finish(ctx, s, e)
}

// findPipe opens a pipe that the process, or another one in its container, has open. It returns nil if none of them has. The
// error is PermissionDenied in a user namespace that is neither theirs nor above it.
func (s *state) findPipe(pipe string, mode int) (*os.File, error) {
	var denied error
	for _, pid := range append([]int{s.Pid}, processes(s.Cgroups)...) {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrPermission) {
			denied = errclass.Errorf(errdefs.ErrPermissionDenied, "its streams can't be opened: %w", err)
		}
		for _, fd := range fds {
			name := filepath.Join(dir, fd.Name())
			if got, err := os.Readlink(name); err != nil || got != pipe {
				continue
			}
			f, err := unix.Open(name, mode|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			if got, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f)); got == pipe {
				return os.NewFile(uintptr(f), pipe), nil
			}
			_ = unix.Close(f) // another file has the number by now
		}
	}
	return nil, denied
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
