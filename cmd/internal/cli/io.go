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

// Stdout is unbuffered standard output, for large writes.
var Stdout = &output{file: os.Stdout}

// output is a file that counts the beginnings and ends of writes. So a signal need not wait for a write that is stuck
// because nobody reads.
type output struct {
	file  *os.File
	steps atomic.Int64 // number of beginnings and ends of writes: odd during a write
}

func (o *output) Write(b []byte) (int, error) {
	o.steps.Add(1)
	defer o.steps.Add(1)
	return o.file.Write(b)
}

// ReadFrom lets the kernel copy if it can.
func (o *output) ReadFrom(r io.Reader) (int64, error) {
	o.steps.Add(1)
	defer o.steps.Add(1)
	return o.file.ReadFrom(r)
}

// SyscallConn is for callers that enlarge a pipe's buffer.
func (o *output) SyscallConn() (syscall.RawConn, error) { return o.file.SyscallConn() }

// newOutput returns buffered standard output. A large copy into an empty buffer bypasses the buffer, so buffering costs
// streams nothing.
func newOutput() *bufio.Writer { return bufio.NewWriterSize(Stdout, 64<<10) }

// Flush flushes standard output. It is for commands that follow something.
func Flush(c *cobra.Command) error {
	if w, ok := c.OutOrStdout().(*bufio.Writer); ok {
		return w.Flush()
	}
	return nil
}

// Quote quotes a word for a POSIX shell.
func Quote(s string) string {
	special := func(r rune) bool {
		return r < 0x80 && !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/=,.:_-", r)
	}
	if s != "" && strings.IndexFunc(s, special) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// IsTerminal reports whether a file is a terminal, and returns its width in columns.
func IsTerminal(f *os.File) (width int, ok bool) {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, false
	}
	return int(ws.Col), true
}

// DieWithReader kills the process by SIGPIPE as soon as nobody reads its standard output any more, even if it does not
// write. It is for commands that may wait long before they write.
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

// Stdin returns standard input. Once ctx is done, reads end with its error, so that a signal takes effect even while no
// input comes.
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

// maxObject bounds a line of standard input. Names and keys have at most 4 KiB.
const maxObject = 64 << 10

// Each calls f for every argument. For an argument "-" it calls f for every line of standard input (ended by NUL with
// -z). It reports errors and continues. At the end it returns an error with the status that all errors share, or else
// 1. Without any object it succeeds.
func Each(c *cobra.Command, args []string, f func(object string) error) error {
	t := Tally{C: c}
	if err := eachObject(c, args, func(object string) error { return t.Add(f(object)) }); err != nil {
		return err
	}
	return t.End()
}

// maxBatch bounds the number of objects that Batch keeps in memory.
const maxBatch = 1 << 16

// Batch is Each for work that is best done on many objects together. do returns an error for each object, nil for
// success; then done is called with each object that succeeded. If do itself fails, done is not called.
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
	// Objects named before a line that can't be read are still handled.
	return cmp.Or(flush(), err, t.End())
}

// A Tally counts errors after which a command continues. If all have the same status, it is the command's.
type Tally struct {
	C      *cobra.Command
	failed int
}

// Add reports an error. If the error must end the command, Add returns it.
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

// End returns an error, which was reported already, if Add was called with one.
func (t *Tally) End() error {
	if t.failed != 0 {
		return Exit(t.failed)
	}
	return nil
}

// eachObject calls f for every argument, and for every line of standard input in place of an argument "-".
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

// EachLine calls f for every non-empty line of standard input (ended by NUL with -z), until f returns an error.
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
