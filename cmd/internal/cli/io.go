package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// newOutput buffers standard output. A large copy into an empty buffer goes straight to the
// file, so streams lose nothing by it.
func newOutput() *bufio.Writer { return bufio.NewWriterSize(os.Stdout, 64<<10) }

// Flush hands what was written to standard output on now: for commands that follow something.
func Flush(c *cobra.Command) error {
	if w, ok := c.OutOrStdout().(*bufio.Writer); ok {
		return w.Flush()
	}
	return nil
}

// IsTerminal tells whether the file is a terminal, and its width in columns.
func IsTerminal(f *os.File) (width int, ok bool) {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, false
	}
	return int(ws.Col), true
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
	failed := 0
	try := func(object string) error {
		if err := c.Context().Err(); err != nil {
			return err
		}
		err := f(object)
		switch {
		case err == nil:
		case c.Context().Err() != nil:
			return err
		default:
			report(c, err)
			if n := status(err); failed == 0 || failed == n {
				failed = n
			} else {
				failed = 1
			}
		}
		return nil
	}
	for _, a := range args {
		if a != "-" {
			if err := try(a); err != nil {
				return err
			}
			continue
		}
		if err := eachLine(c, try); err != nil {
			return err
		}
	}
	if failed != 0 {
		return Exit(failed)
	}
	return nil
}

func eachLine(c *cobra.Command, f func(string) error) error {
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
