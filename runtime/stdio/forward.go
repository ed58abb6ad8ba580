package stdio

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// sink takes the output of a detached process: its log, another program, or nothing. The process never waits for it.
type sink interface {
	Begin() // marks the beginning of a run
	Write(stream string, p []byte)
	Close()
}

// nowhere is the sink that discards output.
type nowhere struct{}

func (nowhere) Begin()               {}
func (nowhere) Write(string, []byte) {}
func (nowhere) Close()               {}

// forwardRoom is how many bytes of output may be queued for the reader, besides those in its pipe.
const forwardRoom = 256 << 10

// forward is the sink that writes both streams to one file, which may be a pipe, as output arrives. Output for which
// the queue has no room is dropped, and a line in its place tells how much. After the reader is gone, everything is
// dropped.
type forward struct {
	to int

	mu      sync.Mutex
	changed *sync.Cond
	queue   []byte
	midline bool  // the last queued byte does not end a line
	lost    int64 // bytes dropped after it
	closed  bool
	gone    bool // the reader is gone
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

// noteRoom is the longest line that reports dropped output.
const noteRoom = 128

// note queues the line about dropped output, if there was any.
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

// deliver writes the queue until the sink is closed.
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
		if len(f.queue) == 0 { // the queue is empty, so there is room for the line
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
			if err != nil { // the disk is full, for example
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

// Close waits for the queue to be written, but only for a moment.
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
