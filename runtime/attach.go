package runtime

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"distkit/runtime/stdio"
)

// Attach are the options for attaching to a detached process.
type Attach struct {
	Input      bool   // pass standard input on to the process
	DetachKeys []byte // keys that detach when typed on a terminal; empty for none
}

// Attach attaches to a detached process. Its output, from now on, goes to this process's standard output and error.
// Standard input, signals and the size of the terminal are passed on to it. Attach returns how the process ended, or
// nil if the user has detached by the keys. If the output was not read fast enough, the error is a [stdio.Missing], and
// the exit is valid nevertheless.
func (p *Process) Attach(ctx context.Context, o Attach) (*Exit, error) {
	l, err := p.attended(ctx, "attach")
	if err != nil {
		return nil, err
	}
	if !l.state.Detached {
		return nil, failed("attach: %s runs in the foreground of process %d", p, l.state.Monitor.Pid)
	}
	if err := p.checkLog(); err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	w, err := p.watch()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	defer signal.Stop(signals)
	done := p.ends(ctx)
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
