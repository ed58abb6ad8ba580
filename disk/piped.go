package disk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// silence is how long the output of an exited command may be quiet before Read fails.
const silence = 2 * time.Second

// Piped is a command whose standard output is read through a pipe. Reading ends with the command: a child process that
// inherited the pipe and outlives the command can't keep the reader waiting.
type Piped struct {
	Ended  chan struct{} // closed after Err and the command's ProcessState are set
	Err    error         // the result of exec.Cmd.Wait
	output *os.File
}

// StartPiped starts a command with a pipe as its standard output, and waits for it in the background. The caller must
// close the Piped. The error is that of [exec.Cmd.Start].
func StartPiped(c *exec.Cmd) (*Piped, error) {
	output, stdout, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer stdout.Close()
	WidenPipe(stdout)
	c.Stdout = stdout
	if err := c.Start(); err != nil {
		_ = output.Close()
		return nil, err
	}
	p := &Piped{Ended: make(chan struct{}), output: output}
	go func() {
		p.Err = c.Wait()
		close(p.Ended)
		_ = output.SetReadDeadline(time.Now().Add(silence)) // for a Read that is already waiting
	}()
	return p, nil
}

// Read reads the command's output. After the command exits, it returns what is left in the pipe and what other
// processes still write. It fails if they keep the pipe open and write nothing for two seconds.
func (p *Piped) Read(b []byte) (int, error) {
	select {
	case <-p.Ended:
		_ = p.output.SetReadDeadline(time.Now().Add(silence))
	default:
	}
	n, err := p.output.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errors.New("the command has exited, but a process that it started keeps its output open")
	}
	return n, err
}

// Close closes the pipe. A Read that waits fails, and a command that still writes gets SIGPIPE.
func (p *Piped) Close() error { return p.output.Close() }
