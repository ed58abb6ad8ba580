package runtime

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// terminal copies between a container's pseudo-terminal and this process's standard streams.
type terminal struct {
	path     string
	dir      *os.File // of the socket, nil unless the socket's own path is too long
	listener *net.UnixListener
	host     console.Console // standard input if that's a terminal, set raw
	master   console.Console
	copied   chan struct{}
	writing  atomic.Bool // to standard output
	err      error       // of that
	detached *streams    // has the master, instead of this process's streams
}

// newTerminal listens on a socket on which the runtime hands the pseudo-terminal over.
func newTerminal(path string) (*terminal, error) {
	_ = os.Remove(path) // of a process that was killed; the claim is ours
	t := &terminal{path: path}
	var err error
	if len(path) > maxSocket {
		// The runtime has to connect to this path, too, so it names our process.
		if t.dir, err = os.Open(filepath.Dir(path)); err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		t.path = fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), t.dir.Fd(), filepath.Base(path))
	}
	if t.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: t.path, Net: "unix"}); err != nil {
		_ = t.dir.Close()
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return t, nil
}

// maxSocket is the most bytes that a socket's path can have (unix(7)).
const maxSocket = 107

// Path is the socket's, for the runtime.
func (t *terminal) Path() string { return t.path }

// start receives the pseudo-terminal, which the runtime has sent by now, and copies.
func (t *terminal) start() error {
	f, err := t.receive()
	if err != nil {
		return fmt.Errorf("receive console: %w", err)
	}
	if t.detached != nil {
		return t.detached.take(f)
	}
	if t.master, err = console.ConsoleFromFile(f); err != nil {
		f.Close()
		return fmt.Errorf("receive console: %w", err)
	}
	// Newlines are the host terminal's business, as with runc in the foreground.
	_ = console.ClearONLCR(t.master.Fd())
	t.resize()
	if host, err := console.ConsoleFromFile(os.Stdin); err == nil {
		if err := host.SetRaw(); err != nil {
			return fmt.Errorf("set terminal raw: %w", err)
		}
		t.host = host
	}
	go func() {
		if _, err := io.Copy(t.master, os.Stdin); err == nil && t.host == nil {
			// The end of a pipe is what ^D is on a terminal.
			_, _ = t.master.Write([]byte{4})
		}
	}()
	t.copied = make(chan struct{})
	go func() {
		defer close(t.copied)
		t.print()
	}()
	return nil
}

// print copies until no process has the terminal open. Where output can't be written it goes on reading, so that the
// container does not block.
func (t *terminal) print() {
	out := flow{to: 1}
	b := make([]byte, 32<<10)
	for {
		n, err := t.master.Read(b)
		if n > 0 && t.err == nil {
			t.writing.Store(true)
			t.err = out.write(b[:n])
			t.writing.Store(false)
		}
		if err != nil {
			return
		}
	}
}

// finish delivers what output is left, and puts our terminal back as it was. What it returns is as of [relay.finish].
func (t *terminal) finish(signals <-chan os.Signal, status int) (int, error) {
	defer t.close()
	for {
		select {
		case <-t.copied:
			switch {
			case errors.Is(t.err, unix.EPIPE):
				return orStatus(status, 128+int(unix.SIGPIPE)), nil
			case t.err != nil:
				return status, fmt.Errorf("write standard output: %w", t.err)
			}
			return status, nil
		case <-time.After(lingering):
			if !t.writing.Load() {
				return status, nil // a process outside the container holds it open
			}
		case s := <-signals:
			if n, ok := ends(s); ok {
				return orStatus(status, n), nil
			}
		}
	}
}

func (t *terminal) receive() (*os.File, error) {
	if err := t.listener.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	conn, err := t.listener.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, errors.New("no descriptor was sent")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		return nil, errors.New("not one descriptor was sent")
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "console"), nil
}

// resize gives the container's terminal the size of ours.
func (t *terminal) resize() {
	if t.master == nil {
		return
	}
	for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
		if err == nil {
			_ = unix.IoctlSetWinsize(int(t.master.Fd()), unix.TIOCSWINSZ, ws)
			return
		}
	}
}

// close puts our terminal back as it was.
func (t *terminal) close() {
	t.listener.Close()
	_ = t.dir.Close()
	if t.host != nil {
		_ = t.host.Reset()
	}
}
