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

// Streams says what the standard streams of a process in the foreground are.
type Streams int

const (
	// Piped gives the process pipes, see [stdio.Pipe].
	Piped Streams = iota
	// Inherited gives the process this process's own standard streams, see [stdio.Inherit].
	Inherited
)

// foreground runs the process and returns its status. Its streams are those that s says, or a terminal.
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
		_, _ = streams.Finish(u.signals, 0) // the runtime's message
		return -1, err
	}
	err = u.end(ctx, exited(status))
	status, ferr := streams.Finish(u.signals, status)
	return status, errors.Join(err, ferr)
}

// forwarded are the signals that are passed on: all that ask a process for something, but for
// those of job control, which concern this process, and those that the parent had ignored.
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

// wait forwards signals to a child until it ends, but for changes of the terminal's size if resize returns true. It waits for
// what the child leaves behind, too.
func wait(s *state, signals <-chan os.Signal, resize func() bool) (int, error) {
	type end struct {
		status int
		err    error
	}
	// The descriptor names this very process: until it is waited for its number isn't reused,
	// and after that the descriptor refuses signals.
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
			// The kernel keeps a namespace's first process from signals it doesn't catch.
			if (sig == unix.SIGINT || sig == unix.SIGTERM) && !catches(s.Pid, sig, "SigCgt", "SigBlk") {
				if unheeded++; unheeded == 3 {
					sig = unix.SIGKILL
				}
			}
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
}

// parent is the process that started this one. dist-userns tells its own ID by a variable, since it may have been killed, and this
// process have another parent, before this program began.
var parent = func() int {
	if pid, err := strconv.Atoi(os.Getenv("DIST_PARENT")); err == nil {
		return pid
	}
	return os.Getppid()
}()

// catchSignals delivers the signals that are passed on. They are caught until this process exits with the status of what it
// ran, since one more of them must not change that status. If the parent was killed before this process caught
// them, the TERM of that may be lost, and is delivered again.
func catchSignals() chan os.Signal {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	if abandoned() {
		signals <- unix.SIGTERM
	}
	return signals
}

// endsWithParent reports whether the kernel was asked to signal this process when its parent dies, as dist-userns
// asks. It is an attribute of the first thread, on which packages are initialised.
var endsWithParent = func() bool {
	sig := int32(0)
	err := unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&sig)), 0, 0, 0)
	return err == nil && sig != 0
}()

// abandoned reports whether the parent has been killed, and this process was to end with it. Whoever killed it
// meant this process: there is no other way to reach it.
func abandoned() bool { return endsWithParent && os.Getppid() != parent }

// catches reports whether a signal is in one of a process's sets: SigCgt has those that it handles, SigBlk those that it
// blocks, which it may take later. It is true for a process that is gone.
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

// reap waits for the process, and for those that it has left to this one.
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
