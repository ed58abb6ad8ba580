package disk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// silence is how long the output of a command that has exited may bring nothing before it counts as ended.
const silence = 2 * time.Second

// Piped is a command whose standard output is read. Its end is the command's: a process that has inherited the pipe and outlives
// the command can't keep the reader waiting.
type Piped struct {
	Ended  chan struct{} // closed once Err and the command's ProcessState are set
	Err    error         // what Wait returned
	output *os.File
}

// StartPiped starts a command with a pipe as its standard output, and waits for it in the background. The caller closes the Piped.
// It returns the error of [exec.Cmd.Start].
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
		_ = output.SetReadDeadline(time.Now().Add(silence)) // of a Read under way
	}()
	return p, nil
}

// Read reads what the command writes. After its exit it reads what is left in the pipe, and what other processes go on writing; it
// fails if they keep the pipe open and write nothing for a while.
func (p *Piped) Read(b []byte) (int, error) {
	select {
	case <-p.Ended:
		_ = p.output.SetReadDeadline(time.Now().Add(silence))
	default:
	}
	n, err := p.output.Read(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errors.New("the command has exited, and a process that it has left behind keeps its output open")
	}
	return n, err
}

// Close closes the pipe. A Read under way fails, and a command that goes on writing gets SIGPIPE.
func (p *Piped) Close() error { return p.output.Close() }
