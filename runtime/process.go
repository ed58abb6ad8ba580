package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Process tells a process from every other that had or will have its number.
type Process struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // ticks from the boot to its start, as the kernel says
	Boot  string `json:"boot"`  // the kernel's ID of the boot
}

var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

// Identify returns the identity of a process that is there now.
func Identify(pid int) (Process, error) {
	_, start, err := processStat(pid)
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return Process{pid, start, bootID()}, nil
}

// Alive tells whether this very process runs. One that has ended and was not waited for doesn't.
func (p Process) Alive() bool {
	if p.Pid <= 0 || p.Boot != bootID() {
		return false
	}
	state, start, err := processStat(p.Pid)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// open returns a descriptor of the process, NotFound where it is no more.
func (p Process) open() (int, error) {
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

// signal sends a signal to this very process.
func (p Process) signal(sig unix.Signal) error {
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

// processStat reads the state and the start of a process.
func processStat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = os.ErrNotExist
		}
		return 0, 0, err
	}
	// The name, in parentheses, may hold anything.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return fields[0][0], start, err
}
