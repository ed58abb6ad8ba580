package stdio

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"distkit/errclass"

	"github.com/containerd/console"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Attach joins this process's standard streams to a detached process.
type Attach struct {
	Dir        string // see [Options]
	Log        Dir
	Terminal   bool   // the process has a terminal
	Input      bool   // pass standard input on to the process
	DetachKeys []byte // keys that detach when typed on a terminal; empty for none

	Own     Ends                       // this process's standard streams
	Signals <-chan os.Signal           // signals that this process receives
	Signal  func(syscall.Signal) error // sends a signal to the process
}

// errDetached is the cause with which the context ends when the user types the detach keys.
var errDetached = errors.New("detached")

// Run copies the process's output, from now on, to this process's until over reports that the process has ended. It
// passes on standard input, signals and the size of the terminal. The process never waits for attached readers: if one
// reads too slowly, the error is a [Missing]. left is true if the user has detached by the keys.
func (a *Attach) Run(ctx context.Context, w *Watcher, over func() (bool, error)) (left bool, err error) {
	r, err := NewReader(a.Log, true)
	if err != nil {
		return false, err
	}
	defer r.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if a.Terminal {
		var host console.Console
		if a.Input {
			if host, err = rawTerminal(a.Own[0]); err != nil {
				return false, err
			}
		}
		if host != nil {
			defer func() { _ = host.Reset() }()
		} else {
			a.DetachKeys = nil
		}
		a.resize(1) // a change of size, even for an instant, makes the process redraw its screen
		a.resize(0)
	} else {
		a.DetachKeys = nil
	}
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case s := <-a.Signals:
				if s != unix.SIGWINCH {
					_ = a.Signal(s.(syscall.Signal))
				} else if a.Terminal {
					a.resize(0)
				}
			}
		}
	}()
	if a.Input {
		go func() {
			switch err := a.feed(a.Own[0]); {
			case errors.Is(err, errDetached):
				cancel(errDetached)
			case err == nil:
				a.control("eof")
			}
		}()
	}
	var missing Missing
	out := bufio.NewWriterSize(a.Own[1], 64<<10)
	err = r.Follow(ctx, w, over, func(e Entry) error {
		missing += Missing(e.Missing)
		if e.Stream == "stderr" {
			if err := out.Flush(); err != nil { // keeps the order of lines if both are one terminal
				return err
			}
			_, err := a.Own[2].Write(e.Text)
			return err
		}
		_, err := out.Write(e.Text)
		return err
	}, out.Flush)
	if left = errors.Is(context.Cause(ctx), errDetached); left {
		err = out.Flush()
	}
	if err != nil {
		return left, err
	}
	return left, missing.Err()
}

// resize sets the process's terminal to the size of this process's, plus some rows.
func (a *Attach) resize(rows uint16) {
	if ws, err := WindowSize(); err == nil {
		a.control(fmt.Sprintf("resize %d %d", ws.Col, ws.Row+rows))
	}
}

// control sends a command to the process's monitor, if there is one.
func (a *Attach) control(line string) {
	if f, err := os.OpenFile(a.Dir+"/control", os.O_WRONLY|unix.O_NONBLOCK, 0); err == nil {
		_, _ = f.Write([]byte(line + "\n"))
		_ = f.Close()
	}
}

// feed copies in to the process's input. The error is EPIPE if no process reads the input. It is errDetached if the
// detach keys were typed; these are not passed on.
func (a *Attach) feed(in io.Reader) error {
	f, err := os.OpenFile(a.Dir+"/stdin", os.O_WRONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return unix.EPIPE
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
		if len(a.DetachKeys) > 0 {
			var left bool
			if out, matched, left = detachKeys(out, a.DetachKeys, matched); left {
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

// detachKeys looks for the detach keys in what was typed. The first keys, as many as before says, were typed earlier.
// It holds back bytes that may begin the keys until it is clear whether they do.
func detachKeys(typed, keys []byte, before int) (out []byte, matched int, left bool) {
	matched = before
	for _, b := range typed {
		for matched > 0 && b != keys[matched] {
			// Part of the held bytes may still begin the keys: keep the longest such end.
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

// ParseDetachKeys parses docker's --detach-keys: keys separated by commas, each a character, or ctrl- and one of a-z @
// [ \ ] ^ _. "" means no keys. Any other text is InvalidArgument.
func ParseDetachKeys(s string) (keys []byte, err error) {
	if s == "" {
		return nil, nil
	}
	for _, k := range strings.Split(s, ",") {
		c, ctrl := strings.CutPrefix(k, "ctrl-")
		switch {
		case len(c) != 1, ctrl && (c[0] < '@' || c[0] > '_') && (c[0] < 'a' || c[0] > 'z'):
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "detach keys %q: %q is no key: want a character, or ctrl- and one", s, k)
		case ctrl:
			keys = append(keys, c[0]&0x1f)
		default:
			keys = append(keys, c[0])
		}
	}
	return keys, nil
}
