package stdio

import "os"

// Foreground are the standard streams of a process that this process waits for. The process's end delivers its output to this
// process's standard streams.
type Foreground struct {
	Ends
	Console *Console // the process gets a terminal; nil if it gets none

	relay *relay
	term  *terminal
}

// Inherit gives a process this process's own standard streams. It can do to them what their owner can, and the runtime makes
// the process's user their owner.
func Inherit() *Foreground {
	return &Foreground{Ends: Ends{os.Stdin, os.Stdout, os.Stderr}}
}

// Pipe gives a process pipes to and from this process's standard streams, so that it can't own, reopen or truncate those.
func Pipe() (*Foreground, error) {
	r, err := newRelay([3]int{0, 1, 2})
	if err != nil {
		return nil, err
	}
	return &Foreground{Ends: r.Ends, relay: r}, nil
}

// Terminal gives a process a terminal, which the runtime sends to a socket with that path.
func Terminal(socket string) (*Foreground, error) {
	f := &Foreground{term: &terminal{}}
	var err error
	f.Console, err = listen(socket, f.term.take)
	return f, err
}

// Begin is called once the process runs. No input is taken from standard input before.
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

// Finish is called when the process has ended with that status, or was not started. It delivers the rest of the output,
// unless a signal that ends this process comes.
//
// It returns the status of the process. If the output was cut short, by a reader that went away or by a signal, the signal's
// status takes the place of 0. Any other failure to deliver is an error.
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

// Close puts this process's terminal back as it was.
func (f *Foreground) Close() {
	f.Console.Close()
	if f.term != nil && f.term.host != nil {
		_ = f.term.host.Reset()
	}
}
