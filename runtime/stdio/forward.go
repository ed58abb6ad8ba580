package stdio

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// sink is where the output of a detached process goes: its log, or instead of that another program or nowhere. The process
// never waits for it.
type sink interface {
	Begin() // a run begins
	Write(stream string, p []byte)
	Close()
}

// nowhere is the sink of a process that keeps no output.
type nowhere struct{}

func (nowhere) Begin()               {}
func (nowhere) Write(string, []byte) {}
func (nowhere) Close()               {}

// forwardRoom is the most bytes of output that wait for their reader, beside what its pipe holds.
const forwardRoom = 256 << 10

// forward is the sink that writes output as it comes, both streams into one file, which may be a pipe. What there is no room for is
// dropped, and a line tells its size at that place. A reader that has gone away gets nothing any more.
type forward struct {
	to int

	mu      sync.Mutex
	changed *sync.Cond
	queue   []byte
	midline bool  // the last byte that was queued ends no line
	lost    int64 // bytes that were dropped since then
	closed  bool
	gone    bool // the reader
	done    chan struct{}
}

func newForward(to int) *forward {
	f := &forward{to: to, done: make(chan struct{})}
	f.changed = sync.NewCond(&f.mu)
	go f.deliver()
	return f
}

func (f *forward) Begin() {}

func (f *forward) Write(_ string, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone {
		return
	}
	if len(f.queue)+noteRoom+len(p) > forwardRoom {
		f.lost += int64(len(p))
		return
	}
	f.note()
	f.queue, f.midline = append(f.queue, p...), p[len(p)-1] != '\n'
	f.changed.Signal()
}

// noteRoom is the most bytes of a line that tells of what was dropped.
const noteRoom = 128

// note queues that line, unless nothing was dropped.
func (f *forward) note() {
	if f.lost == 0 {
		return
	}
	if f.midline {
		f.queue = append(f.queue, '\n')
	}
	f.queue = fmt.Appendf(f.queue, "distkit: %d bytes of output are missing here: their reader was too slow\n", f.lost)
	f.lost, f.midline = 0, false
}

// deliver writes what was queued, until the sink is closed.
func (f *forward) deliver() {
	defer close(f.done)
	defer unix.Close(f.to)
	to := &flow{to: f.to}
	var buf []byte
	for {
		f.mu.Lock()
		for len(f.queue) == 0 && f.lost == 0 && !f.closed {
			f.changed.Wait()
		}
		if len(f.queue) == 0 { // all that was queued is written: there is room to tell
			f.note()
		}
		if len(f.queue) == 0 {
			f.mu.Unlock()
			return
		}
		buf, f.queue = f.queue, buf[:0]
		f.mu.Unlock()
		for piece := buf; len(piece) > 0; {
			n := min(len(piece), pieceRoom)
			err := to.write(piece[:n])
			if errors.Is(err, unix.EPIPE) {
				f.mu.Lock()
				f.gone, f.queue = true, nil
				f.mu.Unlock()
				return
			}
			if err != nil { // a disk is full
				f.mu.Lock()
				f.lost += int64(len(piece))
				f.mu.Unlock()
				time.Sleep(time.Second)
				break
			}
			piece = piece[n:]
		}
	}
}

// Close waits until everything was written, but not for long.
func (f *forward) Close() {
	f.mu.Lock()
	f.closed = true
	f.changed.Signal()
	f.mu.Unlock()
	select {
	case <-f.done:
	case <-time.After(settling):
	}
}
