package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"distkit/runtime/stdio"

	"golang.org/x/sys/unix"
)

// Streams selects the standard streams of a process in the foreground.
type Streams int

const (
	// Piped gives the process pipes: see [stdio.Pipe].
	Piped Streams = iota
	// Inherited gives the process this process's own standard streams: see [stdio.Inherit].
	Inherited
)

// foreground runs the process and returns its status. Its streams are a terminal, if the configuration asks for one,
// else what s selects.
func (u *execution) foreground(ctx context.Context, s Streams) (status int, err error) {
	if err := u.startGuard(); err != nil {
		return -1, u.abandon(ctx, err)
	}
	streams := stdio.Inherit()
	switch {
	case u.state.Terminal:
		streams, err = stdio.Terminal(u.claim.path("console"))
	case s != Inherited:
		streams, err = stdio.Pipe()
	}
	if err != nil {
		return -1, u.abandon(ctx, err)
	}
	_, err = u.start(ctx, &streams.Ends, streams.Console)
	if err == nil {
		streams.Begin()
		if u.exec == "" {
			tellReady()
		}
		status, err = wait(&u.state, u.signals, streams.Resize)
	}
	if err != nil {
		err = u.abandon(ctx, err)
		_, _ = streams.Finish(u.signals, 0) // delivers the runtime's message
		return -1, err
	}
	err = u.end(ctx, exited(status))
	status, ferr := streams.Finish(u.signals, status)
	return status, errors.Join(err, ferr)
}

// forwarded returns the signals to pass on: all that request something from a process, except those for job control,
// which concern this process, and those that the parent has ignored.
func forwarded() []os.Signal {
	all := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH}
	for s := syscall.Signal(34); s <= 64; s++ {
		all = append(all, s)
	}
	var out []os.Signal
	for _, s := range all {
		if !signal.Ignored(s) {
			out = append(out, s)
		}
	}
	return out
}

// wait forwards signals to a child until it ends. A change of the terminal's size is not forwarded if resize returns
// true. After the end, wait also reaps processes that the child has left.
func wait(s *state, signals <-chan os.Signal, resize func() bool) (int, error) {
	type end struct {
		status int
		err    error
	}
	// The descriptor stands for this process: its number is not reused before it is waited for, and afterwards the
	// descriptor rejects signals.
	fd, err := unix.PidfdOpen(s.Pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open container's process: %w", err)
	}
	defer unix.Close(fd)
	ended := make(chan end, 1)
	go func() {
		var e end
		e.status, e.err = reap(s.Pid)
		ended <- e
	}()
	unheeded := 0
	for {
		select {
		case e := <-ended:
			return e.status, e.err
		case got := <-signals:
			sig := got.(syscall.Signal)
			if sig == unix.SIGWINCH && resize() {
				continue
			}
			if sig == unix.SIGTERM && abandoned() {
				sig = unix.SIGKILL
			}
			s.awaitInit(sig)
			// The kernel drops signals to a namespace's first process if it does not catch them.
			if (sig == unix.SIGINT || sig == unix.SIGTERM) && !catches(s.Pid, sig, "SigCgt", "SigBlk") {
				if unheeded++; unheeded == 3 {
					sig = unix.SIGKILL
				}
			}
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
}

// parent is the ID of the process that started this one. dist-userns passes its own ID in a variable: it may be killed,
// and this process get another parent, before this code runs.
var parent = func() int {
	if pid, err := strconv.Atoi(os.Getenv("DIST_PARENT")); err == nil {
		return pid
	}
	return os.Getppid()
}()

// catchSignals returns a channel with the signals to pass on. They stay caught until this process exits, since a late
// signal must not change its exit status. If the parent was killed before this call, the TERM sent for that may be
// lost, so it is sent again.
func catchSignals() chan os.Signal {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	if abandoned() {
		signals <- unix.SIGTERM
	}
	return signals
}

// endsWithParent reports whether this process gets a signal when its parent dies, as dist-userns requests. That is a
// property of the first thread, which also initialises packages.
var endsWithParent = func() bool {
	sig := int32(0)
	err := unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&sig)), 0, 0, 0)
	return err == nil && sig != 0
}()

// abandoned reports whether the parent was killed and this process was to end with it. Whoever kills the parent means
// this process, which can't be reached otherwise.
func abandoned() bool { return endsWithParent && os.Getppid() != parent }

// catches reports whether a signal is in one of a process's sets. SigCgt has the signals with a handler, SigBlk those
// that are blocked and may be taken later. It is true for a process that is gone.
func catches(pid int, sig syscall.Signal, sets ...string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for _, set := range sets {
		_, rest, _ := strings.Cut(string(b), "\n"+set+":")
		mask, err := strconv.ParseUint(strings.TrimSpace(firstLine(rest)), 16, 64)
		if err != nil || mask&(1<<(sig-1)) != 0 {
			return true
		}
	}
	return false
}

// reap waits for the process, and for processes that it has left to this one.
func reap(pid int) (status int, err error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return -1, fmt.Errorf("wait for container's process: %w", err)
		case got == pid:
			return statusOf(ws), nil
		}
	}
}
