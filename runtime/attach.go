package runtime

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"distkit/runtime/stdio"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// Attach is how to join a detached container.
type Attach struct {
	Input      bool   // standard input goes to the process
	DetachKeys []byte // what ends the joining, typed on a terminal; none if empty
}

// Attach joins a detached container: its output from now on comes to this process's standard
// output and error, standard input goes to it, and so do signals and the size of the terminal.
// It returns how the process ended, or nil when the user has left it with the keys. The process never
// waits for those who are attached. If its output was not read fast enough, the error is a [stdio.Missing],
// and the exit is valid nevertheless.
func (c *Container) Attach(ctx context.Context, o Attach) (*Exit, error) {
	l, err := c.live()
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	if !l.state.Detached {
		return nil, failed("attach: container %s runs in the foreground of process %d", c.ID, l.state.Monitor.Pid)
	}
	if err := c.tend(ctx); err != nil {
		return nil, err
	}
	return c.attach(ctx, c.place(), fmt.Sprintf("container %s", c.ID), l, o)
}

// errDetached ends what an attached user leaves.
var errDetached = errors.New("detached")

func (c *Container) attach(ctx context.Context, p place, what string, l looked, o Attach) (exit *Exit, err error) {
	w, err := p.watch(what)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	r, err := stdio.NewReader(p.logDir(), true)
	if err != nil {
		return nil, fmt.Errorf("attach to %s: %w", what, err)
	}
	defer r.Close()
	done := c.ends(ctx, p, what)
	defer done.close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	defer signal.Stop(signals)
	var host console.Console
	if l.state.Terminal {
		if h, herr := console.ConsoleFromFile(os.Stdin); herr == nil && o.Input {
			if err := h.SetRaw(); err != nil {
				return nil, fmt.Errorf("set terminal raw: %w", err)
			}
			defer func() { _ = h.Reset() }()
			host = h
		}
		// A size that differs for an instant makes what is on the screen be drawn again.
		if ws, err := hostSize(); err == nil {
			_ = control(p.private, fmt.Sprintf("resize %d %d", ws.Col, ws.Row+1))
			_ = control(p.private, fmt.Sprintf("resize %d %d", ws.Col, ws.Row))
		}
	}
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-signals:
				if s == unix.SIGWINCH {
					if ws, err := hostSize(); err == nil && l.state.Terminal {
						_ = control(p.private, fmt.Sprintf("resize %d %d", ws.Col, ws.Row))
					}
					continue
				}
				_ = l.state.signal(s.(syscall.Signal))
			}
		}
	}()
	if o.Input {
		go func() {
			keys := o.DetachKeys
			if host == nil {
				keys = nil
			}
			switch err := feed(p.private, os.Stdin, keys); {
			case errors.Is(err, errDetached):
				cancel(errDetached)
			case err == nil:
				_ = control(p.private, "eof")
			}
		}()
	}
	var missing stdio.Missing
	out := bufio.NewWriterSize(os.Stdout, 64<<10)
	err = r.Follow(ctx, w, done.over, func(e stdio.Entry) error {
		missing += stdio.Missing(e.Missing)
		if e.Stream == "stderr" {
			if err := out.Flush(); err != nil { // if both are one terminal, the order is kept
				return err
			}
			_, err := os.Stderr.Write(e.Text)
			return err
		}
		_, err := out.Write(e.Text)
		return err
	}, out.Flush)
	switch {
	case errors.Is(context.Cause(ctx), errDetached):
		return nil, errors.Join(out.Flush(), missing.Err())
	case err != nil:
		return nil, err
	}
	return done.exit, missing.Err()
}

// hostSize is the size of this process's terminal.
func hostSize() (*unix.Winsize, error) {
	for _, f := range []*os.File{os.Stdin, os.Stdout, os.Stderr} {
		if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
			return ws, nil
		}
	}
	return nil, unix.ENOTTY
}

// control tells a monitor something, if there is one.
func control(dir, line string) error {
	f, err := os.OpenFile(dir+"/control", os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Write([]byte(line + "\n"))
	return err
}

// feed copies to a process's input until in ends, or the process's side does, which is an
// error. Where keys are given their coming ends it with errDetached, and they are not passed on.
func feed(dir string, in io.Reader, keys []byte) error {
	f, err := os.OpenFile(dir+"/stdin", os.O_WRONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return unix.EPIPE // it reads nothing
	}
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 32<<10)
	matched := 0
	for {
		n, rerr := in.Read(b)
		out := b[:n]
		if len(keys) > 0 {
			var left bool
			if out, matched, left = detachKeys(out, keys, matched); left {
				_, _ = f.Write(out)
				return errDetached
			}
		}
		if _, err := f.Write(out); err != nil {
			return err
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

// detachKeys looks for keys in what was typed, of which the first were typed before. What may be
// their beginning is held back until it is clear that it isn't.
func detachKeys(typed, keys []byte, before int) (out []byte, matched int, left bool) {
	matched = before
	for _, b := range typed {
		for matched > 0 && b != keys[matched] {
			// The longest end of what was held back that is a beginning of the keys still counts.
			held := keys[:matched]
			n := matched - 1
			for n > 0 && !bytes.Equal(held[matched-n:], keys[:n]) {
				n--
			}
			out = append(out, held[:matched-n]...)
			matched = n
		}
		if b != keys[matched] {
			out = append(out, b)
			continue
		}
		if matched++; matched == len(keys) {
			return out, 0, true
		}
	}
	return out, matched, false
}

// ParseDetachKeys reads docker's --detach-keys: keys with commas between them, a character each,
// or ctrl- and one of a-z @ [ \ ] ^ _; "" is none.
func ParseDetachKeys(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var keys []byte
	for _, k := range splitKeys(s) {
		c, ctrl := bytes.CutPrefix([]byte(k), []byte("ctrl-"))
		switch {
		case len(c) != 1:
			return nil, invalid("detach keys %q: %q is no key: a character, or ctrl- and one", s, k)
		case !ctrl:
			keys = append(keys, c[0])
		case c[0] >= 'a' && c[0] <= 'z':
			keys = append(keys, c[0]-'a'+1)
		case c[0] >= '@' && c[0] <= '_':
			keys = append(keys, c[0]-'@')
		default:
			return nil, invalid("detach keys %q: ctrl-%c is no key", s, c[0])
		}
	}
	return keys, nil
}

func splitKeys(s string) []string {
	var keys []string
	for _, k := range bytes.Split([]byte(s), []byte(",")) {
		keys = append(keys, string(k))
	}
	return keys
}
