package copygraph

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"distkit/batch"
	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

// peer serves the requests of one batch (dist-batch(7)).
type peer interface {
	// stop asks the peer to end.
	stop()
	// ended returns a channel that is closed when the peer has ended.
	ended() <-chan struct{}
	// failure returns the error with which the peer ended, or nil.
	failure() error
	// Close closes the peer's output. Its further writes fail.
	Close() error
}

// killAfter is how long a command may live after SIGTERM.
const killAfter = 5 * time.Second

// child is a peer that is the process of a command.
type child struct {
	*disk.Piped
	cmd *exec.Cmd
}

// startCommand runs a batch command with sh.
func startCommand(command string, unverified bool) (*process, error) {
	stdin, input, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer stdin.Close()
	disk.WidenPipe(input)
	cmd := exec.Command("sh", "-c", command)
	cmd.Stdin, cmd.Stderr = stdin, os.Stderr
	output, err := disk.StartPiped(cmd)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("run %s: %w", command, err), input.Close())
	}
	p := &process{Client: batch.NewClient(output, input), peer: child{output, cmd}}
	p.Unverified = unverified
	return p, nil
}

func (c child) stop() {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	go func() {
		select {
		case <-c.Ended:
		case <-time.After(killAfter):
			_ = c.cmd.Process.Kill()
		}
	}()
}

func (c child) ended() <-chan struct{} { return c.Ended }

// failure returns an error with the class of the exit status. A status of 128 or more is a shell's for a signal, or
// ssh's for a broken connection.
func (c child) failure() error {
	status := c.cmd.ProcessState.ExitCode()
	switch {
	case status == 0:
		return nil
	case status > 0 && status < 128:
		return errclass.Remote(status, fmt.Sprintf("the batch command failed with status %d", status))
	}
	return errclass.Errorf(errdefs.ErrAborted, "the batch command was terminated: %s", c.cmd.ProcessState)
}

// Server serves requests until they end or ctx is done, as [batch.Serve] does with its handlers.
type Server func(ctx context.Context, in io.Reader, out io.Writer) error

// thread is a peer that is a Server in a goroutine.
type thread struct {
	io.Closer // closes its output
	cancel    context.CancelFunc
	done      chan struct{}
	err       error // valid after done is closed
}

// startServer starts a server. Requests go through a pipe of the system, which buffers them while the server is busy.
// Answers are passed in memory, where they are copied once.
func startServer(s Server) (*process, error) {
	requests, input, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	disk.WidenPipe(input)
	output, answers := io.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	t := &thread{Closer: output, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		if t.err = s(ctx, requests, answers); ctx.Err() != nil { // like a command that was killed: others may retry
			t.err = errclass.Errorf(errdefs.ErrAborted, "the server was stopped: %v", t.err)
		}
		_ = requests.Close()
		_ = answers.Close()
	}()
	p := &process{Client: batch.NewClient(output, input), peer: t}
	p.Unverified = true // the server or the target hashes
	return p, nil
}

func (t *thread) stop()                  { t.cancel() }
func (t *thread) ended() <-chan struct{} { return t.done }
func (t *thread) failure() error         { return t.err }
