package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// HostProcess identifies a process on this host. It differs from that of any other process with the same number,
// earlier or later.
type HostProcess struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // time from boot to its start, in the kernel's ticks
	Boot  string `json:"boot"`  // the kernel's ID of the boot
}

var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

// Identify returns the identity of a living process.
func Identify(pid int) (HostProcess, error) {
	s, err := statOf(pid)
	if err != nil {
		return HostProcess{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return HostProcess{pid, s.start, bootID()}, nil
}

// Alive reports whether the process is running. A process that has ended, but was not waited for, is not.
func (p HostProcess) Alive() bool {
	_, alive := p.stat()
	return alive
}

// ending reports whether the process has ended or is ending. The kernel marks the first process of a PID namespace as
// ending before it kills the others in it.
func (p HostProcess) ending() bool {
	const exiting = 0x4 // PF_EXITING
	s, alive := p.stat()
	return !alive || s.flags&exiting != 0 && s.threads <= 1
}

func (p HostProcess) stat() (s procStat, alive bool) {
	if p.Pid <= 0 || p.Boot != bootID() {
		return s, false
	}
	s, err := statOf(p.Pid)
	ended := s.state == 'Z' && s.threads <= 1 || s.state == 'X'
	return s, err == nil && s.start == p.Start && !ended
}

// open returns a pidfd of the process. NotFound: the process is gone.
func (p HostProcess) open() (int, error) {
	fd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EINVAL) {
		return -1, fmt.Errorf("open process %d: %w", p.Pid, err)
	}
	if err == nil && p.Alive() {
		return fd, nil
	}
	if err == nil {
		_ = unix.Close(fd)
	}
	return -1, notFound("process %d has ended", p.Pid)
}

// signal sends a signal to the process.
func (p HostProcess) signal(sig unix.Signal) error {
	fd, err := p.open()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.Pid, err)
	}
	return nil
}

// procStat holds fields of /proc/PID/stat.
type procStat struct {
	state   byte   // of the first thread, like flags; other threads may outlive it
	flags   uint64 // the kernel's PF_*
	session uint64
	threads uint64
	start   uint64
	user    uint64 // processor time, in ticks of 10 ms
	system  uint64
	rss     uint64 // pages
	code    uint64 // exit code of a zombie, in the form of wait(2)
}

func statOf(pid int) (s procStat, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = os.ErrNotExist
		}
		return s, err
	}
	// The name in parentheses may contain anything, so parse after it.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 50 || len(fields[0]) != 1 {
		return s, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	s.state = fields[0][0]
	for _, f := range []struct {
		at int
		to *uint64
	}{{3, &s.session}, {6, &s.flags}, {17, &s.threads}, {11, &s.user}, {12, &s.system}, {19, &s.start}, {21, &s.rss}, {49, &s.code}} {
		if *f.to, err = strconv.ParseUint(string(fields[f.at]), 10, 64); err != nil {
			return s, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
	}
	return s, nil
}

// waitForeign waits for the end of a process that is not our child. Its exit status is in /proc until its parent has
// waited for it. After that, kernels from 6.15 on report it to the holder of a pidfd.
func waitForeign(p HostProcess, fd int) Exit {
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

// exitStatus returns the exit status of a process that has ended (Linux 6.15).
func exitStatus(fd int) (status int, ok bool) {
	const getInfo, exit = 0xc040ff0b, 1 << 3 // PIDFD_GET_INFO, PIDFD_INFO_EXIT
	info := pidfdInfo{mask: exit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.mask&exit == 0 {
		return 0, false
	}
	return statusOf(unix.WaitStatus(info.exitCode)), true
}

// zombieStatus returns the status of a process that has ended but was not waited for.
func zombieStatus(p HostProcess) (status int, ok bool) {
	s, err := statOf(p.Pid)
	return statusOf(unix.WaitStatus(s.code)), err == nil && s.state == 'Z' && s.start == p.Start
}

// statusOf returns the exit status of a process, or 128+n if signal n killed it.
func statusOf(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
