package stdio

import "os"

// Foreground are the standard streams of a process that this process waits for. When that process ends, Finish delivers
// the rest of its output to this process's standard streams.
type Foreground struct {
	Ends
	Console *Console // receives the process's terminal; nil if it has none

	relay *relay
	term  *terminal
}

// Inherit gives a process this process's own standard streams. It can then do to them what their owner can: the runtime
// makes the process's user their owner.
func Inherit() *Foreground {
	return &Foreground{Ends: Ends{os.Stdin, os.Stdout, os.Stderr}}
}

// Pipe gives a process pipes to and from this process's standard streams, so that it can't take over, reopen or
// truncate these.
func Pipe() (*Foreground, error) {
	r, err := newRelay([3]int{0, 1, 2})
	if err != nil {
		return nil, err
	}
	return &Foreground{Ends: r.Ends, relay: r}, nil
}

// Terminal gives a process a terminal. The runtime sends it to a socket at that path.
func Terminal(socket string) (*Foreground, error) {
	f := &Foreground{term: &terminal{}}
	var err error
	f.Console, err = listen(socket, f.term.take)
	return f, err
}

// Begin is called when the process runs. Nothing is read from standard input before.
func (f *Foreground) Begin() {
	if f.relay != nil {
		f.relay.begin()
	}
}

// Resize gives the process's terminal the size of this process's. It returns false if the process has no terminal.
func (f *Foreground) Resize() bool {
	if f.term == nil {
		return false
	}
	f.term.resize()
	return true
}

// Finish is called when the process has ended with a status, or was not started. It delivers the rest of the output,
// unless a signal that terminates this process arrives.
//
// It returns the process's status. If the output was cut short because the reader is gone or a signal arrived, a status
// 0 is replaced by that of the signal. Any other failure to deliver is an error.
func (f *Foreground) Finish(signals <-chan os.Signal, status int) (int, error) {
	defer f.Close()
	switch {
	case f.relay != nil:
		return f.relay.finish(signals, status)
	case f.term != nil && f.term.copied != nil:
		return f.term.finish(signals, status)
	}
	return status, nil
}

// Close restores this process's terminal.
func (f *Foreground) Close() {
	f.Console.Close()
	if f.term != nil && f.term.host != nil {
		_ = f.term.host.Reset()
	}
}
