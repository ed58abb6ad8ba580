// Package program runs a program that serves a protocol of ours: a verb and operands are its arguments, its standard output is data,
// and its exit status is one of package errclass. What it says is a stranger's.
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
	// Grace is how long a process that was told to stop may live.
	Grace   = 5 * time.Second
	maxText = 4 << 10 // kept of what a process says on standard error
	maxName = 64
)

// IsName reports whether s can stand behind the prefix of a program's name. It has no slash and no dot, and begins with no minus.
func IsName(s string) bool {
	return s != "" && len(s) <= maxName && s[0] != '-' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// Process is one call of a program. Reading its standard output ends in io.EOF if its status is 0, else in the error that its
// status and its last line tell.
type Process struct {
	*exec.Cmd
	// Patience, if it is not 0, bounds how long the process may live once its output has ended.
	Patience time.Duration

	ctx    context.Context
	cancel context.CancelFunc
	out    *disk.Piped
	said   tail
	ended  sync.Once
	err    error
}

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-maxText):]
	return len(p), nil
}

// Start starts a program of PATH. prepare sets the command's other fields, but for its output. The process gets SIGTERM once ctx is
// done, and is killed after [Grace]; with Setpgid, its process group is. The error is NotImplemented if there is no such program.
func Start(parent context.Context, prepare func(*exec.Cmd), name string, args ...string) (*Process, error) {
	ctx, cancel := context.WithCancel(parent)
	p := &Process{Cmd: exec.CommandContext(ctx, name, args...), ctx: parent, cancel: cancel}
	prepare(p.Cmd)
	p.Cancel = p.terminate
	p.WaitDelay = Grace
	p.Stderr = &p.said
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

// hasGroup reports whether the process leads a process group of its own.
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

// StopAfter tells the process to stop when the time is over, unless the timer is stopped before.
func (p *Process) StopAfter(d time.Duration) *time.Timer { return time.AfterFunc(d, p.cancel) }

// End waits for the process and returns its failure, if any. A process group of its own ends with it.
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

// endGroup kills what is left of a process group, and waits until it is gone: until then it may still write. A zombie that nobody
// reaps is let be.
func endGroup(group int) {
	for end := time.Now().Add(2 * time.Second); syscall.Kill(group, syscall.SIGKILL) == nil && time.Now().Before(end); {
		time.Sleep(2 * time.Millisecond)
	}
}

// Close ends the process if it still runs.
func (p *Process) Close() error {
	p.cancel()
	_ = p.End()
	return p.CloseOutput()
}

// CloseOutput closes the pipe that the process writes to.
func (p *Process) CloseOutput() error { return p.out.Close() }

func (p *Process) failure(err error) error {
	if err == nil || errors.Is(err, exec.ErrWaitDelay) { // it has succeeded, but a child that it left holds standard error open
		return nil
	}
	if p.ctx.Err() != nil {
		return context.Cause(p.ctx)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(p.said.b)), "\n")
	name := p.Args[0]
	text := strings.TrimPrefix(errclass.OneLine(strings.ToValidUTF8(lines[len(lines)-1], "")), name+": ")
	if text == "" {
		text = exit.String()
	}
	return errclass.Remote(exit.ExitCode(), name+": "+text)
}
