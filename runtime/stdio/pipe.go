package stdio

import (
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Ends are the standard input, output and error of a process; all are nil for a process with a terminal. Ends
// implements go-runc's IO.
type Ends [3]*os.File

// Set makes these the streams of a command.
func (e *Ends) Set(c *exec.Cmd) {
	if e[0] != nil {
		c.Stdin, c.Stdout, c.Stderr = e[0], e[1], e[2]
	}
}

// The rest of go-runc's interface is not used: the files are passed to the runtime directly.

func (*Ends) Close() error          { return nil }
func (*Ends) Stdin() io.WriteCloser { return nil }
func (*Ends) Stdout() io.ReadCloser { return nil }
func (*Ends) Stderr() io.ReadCloser { return nil }

// close closes the files. Output and error may be the same file.
func (e *Ends) close() {
	for i, f := range e {
		if f != nil && (i == 0 || f != e[i-1]) {
			_ = f.Close()
		}
	}
}

// newPipe makes a pipe with two blocking ends.
func newPipe() (r, w int, err error) {
	var p [2]int
	err = unix.Pipe2(p[:], unix.O_CLOEXEC)
	return p[0], p[1], err
}

// queued returns how many bytes a pipe holds.
func queued(pipe int) (int, error) { return unix.IoctlGetInt(pipe, unix.TIOCINQ) }

func isTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// poll waits for one of the events, at most for d unless d is negative.
func poll(d time.Duration, fds ...unix.PollFd) ([]unix.PollFd, error) {
	for {
		if _, err := unix.Poll(fds, int(d.Milliseconds())); err != unix.EINTR {
			return fds, err
		}
	}
}

// always makes poll wait without a limit.
const always = -time.Millisecond

func readable(fd int) unix.PollFd { return unix.PollFd{Fd: int32(fd), Events: unix.POLLIN} }
func writable(fd int) unix.PollFd { return unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT} }

// latch can be closed once. Its descriptor is readable after that.
type latch struct {
	fd     int
	once   sync.Once
	closed chan struct{}
}

func newLatch() (*latch, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	return &latch{fd: fd, closed: make(chan struct{})}, err
}

func (l *latch) close() {
	l.once.Do(func() {
		close(l.closed)
		_, _ = unix.Write(l.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // any number except 0 makes it readable
	})
}

func (l *latch) isClosed() bool {
	select {
	case <-l.closed:
		return true
	default:
		return false
	}
}
