package progress

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
)

// patience is how long a step may take before a person is told about it.
const patience = time.Second

// A Step is one line on standard error about a slow step, from a second after its beginning until its end, if standard error is a terminal. A
// nil Step does nothing. Its methods may be called by several goroutines at a time.
type Step struct {
	what         string
	screen       screen
	bytes, total atomic.Int64
	done, of     atomic.Int64
	stop         chan struct{}
	end          sync.Once
	stopped      sync.WaitGroup
}

// Begin begins a step. What says what is counted by Count, such as "layers": without it bytes are counted alone. The caller ends it.
func Begin(what string) *Step {
	s := &Step{what: what, screen: screen{out: os.Stderr}, stop: make(chan struct{})}
	if _, _, ok := s.screen.size(); !ok {
		return nil
	}
	s.stopped.Go(s.show)
	return s
}

// Total sets the bytes and the number of things that are expected, 0 if that is not known.
func (s *Step) Total(bytes, things int64) {
	if s != nil {
		s.total.Store(bytes)
		s.of.Store(things)
	}
}

// Add adds bytes that are done.
func (s *Step) Add(bytes int64) {
	if s != nil {
		s.bytes.Add(bytes)
	}
}

// Count adds one thing that is done.
func (s *Step) Count() {
	if s != nil {
		s.done.Add(1)
	}
}

// Reader counts what is read from r.
func (s *Step) Reader(r io.Reader) io.Reader {
	if s == nil {
		return r
	}
	return counted{Reader: r, step: s}
}

// Writer counts what is written to w.
func (s *Step) Writer(w io.Writer) io.Writer {
	if s == nil {
		return w
	}
	return counted{Writer: w, step: s}
}

type counted struct {
	io.Reader
	io.Writer
	step *Step
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.step.Add(int64(n))
	return n, err
}

// SetReadDeadline sets the reader's, if it has deadlines.
func (c counted) SetReadDeadline(at time.Time) error {
	if d, ok := c.Reader.(interface{ SetReadDeadline(time.Time) error }); ok {
		return d.SetReadDeadline(at)
	}
	return os.ErrNoDeadline
}

func (c counted) Write(b []byte) (int, error) {
	n, err := c.Writer.Write(b)
	c.step.Add(int64(n))
	return n, err
}

// End ends the step. Nothing is left on the terminal. A step that has ended stays so: a command ends it before it prints, and defers End for
// its other ways out.
func (s *Step) End() {
	if s != nil {
		s.end.Do(func() { close(s.stop) })
		s.stopped.Wait()
	}
}

func (s *Step) show() {
	defer s.screen.end()
	m := meter{begin: time.Now()}
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			m.add(now, s.bytes.Load())
			if width, _, ok := s.screen.size(); ok && now.Sub(m.begin) >= patience {
				s.screen.draw([]string{s.line(&m, width-1, now)})
			}
		case <-s.stop:
			s.screen.mu.Lock()
			defer s.screen.mu.Unlock()
			s.screen.erase()
			return
		}
	}
}

// line says what is done of what, and when it will be.
func (s *Step) line(m *meter, width int, now time.Time) string {
	bytes, total, done, of := s.bytes.Load(), s.total.Load(), s.done.Load(), s.of.Load()
	percent, size, things, rate := "", "", "", ""
	if bytes > 0 || total > 0 {
		size, rate = humanize.IBytes(uint64(bytes)), m.rate(now, false)
	}
	if total > 0 {
		percent = fmt.Sprintf("%d%%", int(100*min(float64(bytes)/float64(total), 1)))
		size += " of " + humanize.IBytes(uint64(total))
	}
	switch {
	case s.what == "":
	case of > 0:
		things = fmt.Sprintf("%s of %s %s", humanize.Comma(done), humanize.Comma(of), s.what)
	default:
		things = fmt.Sprintf("%s %s", humanize.Comma(done), s.what)
	}
	name := filepath.Base(os.Args[0]) + ": "
	return cut(name+join(width-len(name), percent, things, size, m.left(total-bytes), rate, fmt.Sprintf("elapsed: %.0fs", now.Sub(m.begin).Seconds())), width)
}
