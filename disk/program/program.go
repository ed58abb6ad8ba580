// Package program runs helper programs that serve one of our protocols, such as dist-remote-NAME.
//
// The arguments are a verb and its operands. Standard output is data, the exit status is one of package errclass, and
// the last line of standard error is the error message. All that a helper writes is untrusted: messages are bounded and
// escaped.
//
// [Start] starts a program of PATH. The caller reads the [Process] to its end: io.EOF means status 0; any other error
// has the class of the exit status. [Process.Close] stops a process that is no longer wanted. The error is
// NotImplemented if PATH has no such program, and Aborted if its output breaks off.
package program

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

const (
	// Grace is how long a process may live after SIGTERM, before it is killed.
	Grace   = 5 * time.Second
	maxText = 4 << 10 // bytes of standard error that are kept
	maxName = 64
)

// IsName reports whether s may follow the prefix in a program's name, as in dist-remote-NAME: at most 64 lower-case
// letters, digits and minus signs, without a minus sign in front.
func IsName(s string) bool {
	return s != "" && len(s) <= maxName && s[0] != '-' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// Process is a running helper program. Read returns its standard output, and at its end io.EOF if the exit status is 0,
// or an error with the status's class and the last line of standard error.
type Process struct {
	*exec.Cmd
	// Patience, if not 0, is how long the process may live after its output has ended.
	Patience time.Duration

	ctx    context.Context
	cancel context.CancelFunc
	out    *disk.Piped
	stderr tail
	ended  sync.Once
	err    error
}

// tail keeps the last maxText bytes that are written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-maxText):]
	return len(p), nil
}

// Start starts a program of PATH. prepare may set any field of the command but its output. When ctx is done the process
// gets SIGTERM, and is killed after [Grace]; if prepare sets Setpgid, both go to its process group. The error is
// NotImplemented if there is no such program.
func Start(parent context.Context, prepare func(*exec.Cmd), name string, args ...string) (*Process, error) {
	ctx, cancel := context.WithCancel(parent)
	p := &Process{Cmd: exec.CommandContext(ctx, name, args...), ctx: parent, cancel: cancel}
	prepare(p.Cmd)
	p.Cancel = p.terminate
	p.WaitDelay = Grace
	p.Stderr = &p.stderr
	var err error
	if p.out, err = disk.StartPiped(p.Cmd); err != nil {
		cancel()
		if errors.Is(err, exec.ErrNotFound) {
			return nil, errclass.Errorf(errdefs.ErrNotImplemented, "there is no %s on PATH", name)
		}
		return nil, err
	}
	return p, nil
}

// hasGroup reports whether the process leads its own process group.
func (p *Process) hasGroup() bool { return p.SysProcAttr != nil && p.SysProcAttr.Setpgid }

func (p *Process) terminate() error {
	if !p.hasGroup() {
		return p.Process.Signal(syscall.SIGTERM)
	}
	err := syscall.Kill(-p.Process.Pid, syscall.SIGTERM)
	if errors.Is(err, syscall.ESRCH) {
		err = os.ErrProcessDone
	}
	return err
}

func (p *Process) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if err != nil {
		if p.Patience > 0 {
			defer p.StopAfter(p.Patience).Stop()
		}
		if werr := p.End(); werr != nil {
			err = werr
		} else if errors.Is(err, os.ErrClosed) {
			err = io.EOF
		} else if err != io.EOF {
			err = errclass.Errorf(errdefs.ErrAborted, "%s: %w", p.Args[0], err)
		}
	}
	return n, err
}

// StopAfter terminates the process after d, unless the caller stops the timer before.
func (p *Process) StopAfter(d time.Duration) *time.Timer { return time.AfterFunc(d, p.cancel) }

// End waits for the process and returns its error. Then it kills what is left of the process's own group.
func (p *Process) End() error {
	p.ended.Do(func() {
		<-p.out.Ended
		p.err = p.failure(p.out.Err)
		p.cancel()
		if p.hasGroup() {
			endGroup(-p.Process.Pid)
		}
	})
	return p.err
}

// endGroup kills the rest of a process group, and waits until it is gone, because a member may write until then. It
// gives up after two seconds: a zombie that nobody reaps stays.
func endGroup(group int) {
	for end := time.Now().Add(2 * time.Second); syscall.Kill(group, syscall.SIGKILL) == nil && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond)
	}
}

// Close terminates the process if it still runs, and waits for it.
func (p *Process) Close() error {
	p.cancel()
	_ = p.End()
	return p.CloseOutput()
}

// CloseOutput closes the pipe that the process writes to.
func (p *Process) CloseOutput() error { return p.out.Close() }

func (p *Process) failure(err error) error {
	if err == nil || errors.Is(err, exec.ErrWaitDelay) { // ErrWaitDelay: it succeeded, but a child process holds its standard error open
		return nil
	}
	if p.ctx.Err() != nil {
		return context.Cause(p.ctx)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(p.stderr.b)), "\n")
	name := p.Args[0]
	text := strings.TrimPrefix(errclass.OneLine(strings.ToValidUTF8(lines[len(lines)-1], "")), name+": ")
	if text == "" {
		text = exit.String()
	}
	return errclass.Remote(exit.ExitCode(), name+": "+text)
}
