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
	host    console.Console // standard input in raw mode, if it is a terminal
	master  console.Console // nil until the runtime has sent it
	copied  chan struct{}
	writing atomic.Bool // writing to standard output has not failed
	err     error       // the error of writing to it
}

// take receives the terminal's master and starts to copy.
func (t *terminal) take(f *os.File) (err error) {
	if t.master, err = console.ConsoleFromFile(f); err != nil {
		_ = f.Close()
		return err
	}
	// The host's terminal converts newlines, as with runc in the foreground.
	_ = console.ClearONLCR(t.master.Fd())
	t.resize()
	if t.host, err = rawTerminal(os.Stdin); err != nil {
		return err
	}
	go func() {
		if _, err := io.Copy(t.master, os.Stdin); err == nil && t.host == nil {
			// the end of our input becomes ^D on the terminal
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

// print copies output until no process has the terminal open. If writing fails, it still reads, so that the container
// does not block.
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

// finish delivers the rest of the output.
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
				return status, nil // a process outside of the container keeps the terminal open
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

// rawTerminal switches a terminal to raw mode and returns it. It returns nil if the file is not a terminal.
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

// WindowSize returns the size of this process's terminal. The error is ENOTTY if there is none.
func WindowSize() (*unix.Winsize, error) {
	for fd := range 3 {
		if ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil {
			return ws, nil
		}
	}
	return nil, unix.ENOTTY
}
