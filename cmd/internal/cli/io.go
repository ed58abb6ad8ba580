package cli

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Stdout is standard output without a buffer, for what is written in large pieces.
var Stdout = &output{file: os.Stdout}

// output is a file that notes when a write to it begins and ends, so that a signal need not wait for a reader that
// does not read.
type output struct {
	file  *os.File
	steps atomic.Int64 // beginnings and ends of writes: odd during one
}

func (o *output) Write(b []byte) (int, error) {
	o.steps.Add(1)
	defer o.steps.Add(1)
	return o.file.Write(b)
}

// ReadFrom lets the kernel copy, where it can.
func (o *output) ReadFrom(r io.Reader) (int64, error) {
	o.steps.Add(1)
	defer o.steps.Add(1)
	return o.file.ReadFrom(r)
}

// SyscallConn is for callers that enlarge a pipe.
func (o *output) SyscallConn() (syscall.RawConn, error) { return o.file.SyscallConn() }

// newOutput buffers standard output. A large copy into an empty buffer goes straight to the
// file, so streams lose nothing by it.
func newOutput() *bufio.Writer { return bufio.NewWriterSize(Stdout, 64<<10) }

// Flush hands what was written to standard output on now: for commands that follow something.
func Flush(c *cobra.Command) error {
	if w, ok := c.OutOrStdout().(*bufio.Writer); ok {
		return w.Flush()
	}
	return nil
}

// Quote returns a word as a POSIX shell takes it.
func Quote(s string) string {
	special := func(r rune) bool {
		return r < 0x80 && !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/=,.:_-", r)
	}
	if s != "" && strings.IndexFunc(s, special) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// IsTerminal tells whether the file is a terminal, and its width in columns.
func IsTerminal(f *os.File) (width int, ok bool) {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, false
	}
	return int(ws.Col), true
}

// DieWithReader ends the process by SIGPIPE as soon as its standard output has no reader any more, even while it writes nothing. It
// is for commands that may wait long before they write.
func DieWithReader() {
	go func() {
		for {
			fds := []unix.PollFd{{Fd: 1}}
			_, err := unix.Poll(fds, -1)
			if fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0 {
				DieBy(unix.SIGPIPE)
			}
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
}

// Stdin is standard input whose reads end with ctx's error once ctx is done, so that a
// signal is obeyed also while a producer upstream is silent.
func Stdin(ctx context.Context) (io.ReadCloser, error) {
	var p [2]int
	if err := unix.Pipe(p[:]); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	unix.CloseOnExec(p[0])
	unix.CloseOnExec(p[1])
	wake := os.NewFile(uintptr(p[1]), "wake")
	stop := context.AfterFunc(ctx, func() { _ = wake.Close() })
	return &stdin{ctx: ctx, wake: p[0], stop: func() {
		if stop() {
			_ = wake.Close()
		}
	}}, nil
}

type stdin struct {
	ctx  context.Context
	wake int
	stop func()
}

func (s *stdin) Read(b []byte) (int, error) {
	for {
		fds := []unix.PollFd{{Fd: 0, Events: unix.POLLIN}, {Fd: int32(s.wake), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("read standard input: %w", err)
		}
		if fds[1].Revents != 0 {
			return 0, s.ctx.Err()
		}
		return os.Stdin.Read(b)
	}
}

func (s *stdin) Close() error {
	s.stop()
	return unix.Close(s.wake)
}

// maxObject bounds one line of standard input: names and keys are at most 4 KiB.
const maxObject = 64 << 10

// Each calls f for every argument, and for every line of standard input where an argument is
// "-" (ended by NUL with -z). It goes on after an error, reports each, and exits non-zero at
// the end: with the class they share, else 1. No object at all is success.
func Each(c *cobra.Command, args []string, f func(object string) error) error {
	t := Tally{C: c}
	if err := eachObject(c, args, func(object string) error { return t.Add(f(object)) }); err != nil {
		return err
	}
	return t.End()
}

// maxBatch bounds how many objects Batch keeps in memory.
const maxBatch = 1 << 16

// Batch is Each for what is best done for many objects at once. do returns an error for each object, or nil if it is done;
// done is then called with the object. After do's own error, none of them is done.
func Batch(c *cobra.Command, args []string, do func(objects []string) ([]error, error), done func(object string) error) error {
	t := Tally{C: c}
	var objects []string
	flush := func() error {
		if len(objects) == 0 {
			return nil
		}
		errs, err := do(objects)
		if err != nil {
			return err
		}
		for i, object := range objects {
			if errs[i] == nil {
				errs[i] = done(object)
			}
			if err := t.Add(errs[i]); err != nil {
				return err
			}
		}
		objects = objects[:0]
		return nil
	}
	err := eachObject(c, args, func(object string) error {
		if objects = append(objects, object); len(objects) < maxBatch {
			return nil
		}
		return flush()
	})
	if err != nil && c.Context().Err() != nil {
		return err
	}
	// A line that can't be read spares nothing that was named before it.
	return cmp.Or(flush(), err, t.End())
}

// A Tally reports errors after which a command goes on, and keeps the status that they share.
type Tally struct {
	C      *cobra.Command
	failed int
}

// Add reports an error. It returns one that ends the command.
func (t *Tally) Add(err error) error {
	switch {
	case err == nil:
	case t.C.Context().Err() != nil:
		return err
	default:
		Report(t.C, err)
		if n := Status(err); t.failed == 0 || t.failed == n {
			t.failed = n
		} else {
			t.failed = 1
		}
	}
	return nil
}

// End returns an error, already reported, if Add was given one.
func (t *Tally) End() error {
	if t.failed != 0 {
		return Exit(t.failed)
	}
	return nil
}

// eachObject calls f for every argument, and for every line of standard input where an argument is "-".
func eachObject(c *cobra.Command, args []string, f func(string) error) error {
	try := func(object string) error {
		if err := c.Context().Err(); err != nil {
			return err
		}
		return f(object)
	}
	for _, a := range args {
		if a != "-" {
			if err := try(a); err != nil {
				return err
			}
		} else if err := EachLine(c, try); err != nil {
			return err
		}
	}
	return nil
}

// EachLine calls f for every line of standard input that is not empty (ended by NUL with -z), until it returns an error.
func EachLine(c *cobra.Command, f func(string) error) error {
	in, err := Stdin(c.Context())
	if err != nil {
		return err
	}
	defer in.Close()
	end := byte('\n')
	if z := c.Flags().Lookup("zero"); z != nil && z.Value.String() == "true" {
		end = 0
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxObject)
	lines.Split(func(data []byte, eof bool) (int, []byte, error) {
		for i, b := range data {
			if b == end {
				return i + 1, data[:i], nil
			}
		}
		if eof && len(data) > 0 {
			return len(data), data, nil
		}
		return 0, nil, nil
	})
	for lines.Scan() {
		if lines.Text() == "" {
			continue
		}
		if err := f(lines.Text()); err != nil {
			return err
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return Usagef("a line of standard input is longer than %d bytes", maxObject)
	}
	return lines.Err()
}
