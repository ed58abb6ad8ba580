package stdio

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// terminal copies between a process's terminal and this process's standard streams.
type terminal struct {
	host    console.Console // standard input if that is a terminal, set raw
	master  console.Console // nil until it was received
	copied  chan struct{}
	writing atomic.Bool // to standard output
	err     error       // of writing to it
}

// take takes the terminal's master, and begins to copy.
func (t *terminal) take(f *os.File) (err error) {
	if t.master, err = console.ConsoleFromFile(f); err != nil {
		_ = f.Close()
		return err
	}
	// Newlines are the host terminal's business, as with runc in the foreground.
	_ = console.ClearONLCR(t.master.Fd())
	t.resize()
	if t.host, err = rawTerminal(os.Stdin); err != nil {
		return err
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

// print copies until no process has the terminal open. If the output can't be written, it goes on reading, so that the
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

// finish delivers the output that is left.
func (t *terminal) finish(signals <-chan os.Signal, status int) (int, error) {
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
				return status, nil // a process outside the container holds the terminal open
			}
		case s := <-signals:
			if n, ok := ends(s); ok {
				return orStatus(status, n), nil
			}
		}
	}
}

// resize gives the process's terminal the size of this process's.
func (t *terminal) resize() {
	if ws, err := WindowSize(); err == nil && t.master != nil {
		_ = unix.IoctlSetWinsize(int(t.master.Fd()), unix.TIOCSWINSZ, ws)
	}
}

// rawTerminal sets a terminal raw, and returns it. It returns nil if the file is no terminal.
func rawTerminal(f *os.File) (console.Console, error) {
	host, err := console.ConsoleFromFile(f)
	if err != nil {
		return nil, nil
	}
	if err := host.SetRaw(); err != nil {
		return nil, fmt.Errorf("set terminal raw: %w", err)
	}
	return host, nil
}

// WindowSize returns the size of this process's terminal, and ENOTTY if it has none.
func WindowSize() (*unix.Winsize, error) {
	for fd := range 3 {
		if ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil {
			return ws, nil
		}
	}
	return nil, unix.ENOTTY
}
