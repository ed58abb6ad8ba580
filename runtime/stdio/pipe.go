package stdio

import (
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Ends are what a process gets as standard input, output and error; none if it gets a terminal. They are the IO of go-runc's
// options.
type Ends [3]*os.File

// Set gives a process these streams.
func (e *Ends) Set(c *exec.Cmd) {
	if e[0] != nil {
		c.Stdin, c.Stdout, c.Stderr = e[0], e[1], e[2]
	}
}

// The rest of go-runc's interface is not used: no process copies its own output.

func (*Ends) Close() error          { return nil }
func (*Ends) Stdin() io.WriteCloser { return nil }
func (*Ends) Stdout() io.ReadCloser { return nil }
func (*Ends) Stderr() io.ReadCloser { return nil }

// close closes the files. Output and error may be one file.
func (e *Ends) close() {
	for i, f := range e {
		if f != nil && (i == 0 || f != e[i-1]) {
			_ = f.Close()
		}
	}
}

// newPipe makes a pipe whose both ends block.
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

// poll waits for one of the events, and at most for d if that is not negative.
func poll(d time.Duration, fds ...unix.PollFd) ([]unix.PollFd, error) {
	for {
		if _, err := unix.Poll(fds, int(d.Milliseconds())); err != unix.EINTR {
			return fds, err
		}
	}
}

// always is poll's time without a limit.
const always = -time.Millisecond

func readable(fd int) unix.PollFd { return unix.PollFd{Fd: int32(fd), Events: unix.POLLIN} }
func writable(fd int) unix.PollFd { return unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT} }

// latch is closed once. Its descriptor is readable from then on.
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
		_, _ = unix.Write(l.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // any number but 0
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
