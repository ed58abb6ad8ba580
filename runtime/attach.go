package runtime

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"distkit/runtime/stdio"
)

// Attach says how to join a detached process.
type Attach struct {
	Input      bool   // standard input goes to the process
	DetachKeys []byte // keys that end the joining if typed on a terminal; none if empty
}

// Attach joins a detached container: its output from now on goes to this process's standard output and error, standard input
// goes to it, and so do signals and the size of the terminal. It returns how the process ended, or nil if the user has left by
// the keys. If the output was not read fast enough, the error is a [stdio.Missing], and the exit is valid nevertheless.
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

func (c *Container) attach(ctx context.Context, p place, what string, l looked, o Attach) (*Exit, error) {
	w, err := p.watch(what)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	defer signal.Stop(signals)
	done := c.ends(ctx, p, what)
	defer done.close()
	a := stdio.Attach{
		Dir: p.private, Log: p.logDir(), Terminal: l.state.Terminal, Input: o.Input, DetachKeys: o.DetachKeys,
		Own: stdio.Ends{os.Stdin, os.Stdout, os.Stderr}, Signals: signals, Signal: func(s syscall.Signal) error { return l.state.signal(s) },
	}
	left, err := a.Run(ctx, w, done.over)
	if left {
		return nil, err
	}
	return done.exit, err
}
