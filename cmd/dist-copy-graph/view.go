package main

import (
	"os"
	"sync"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/image/copygraph"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// view draws the progress of objects on standard error.
type view struct {
	display *progress.Display
	stop    chan struct{}
	stopped sync.WaitGroup

	mu      sync.Mutex
	objects []*progress.Object
	index   map[digest.Digest]*progress.Object
}

// shown draws progress until end is called, if standard error is a terminal.
func shown(g *copygraph.Copy, quiet bool, end func() error) func() error {
	if _, ok := cli.IsTerminal(os.Stderr); !ok || quiet {
		return end
	}
	v := newView()
	g.Progress = v
	return func() error {
		v.end()
		return end()
	}
}

func newView() *view {
	v := &view{display: progress.New(os.Stderr), stop: make(chan struct{}), index: map[digest.Digest]*progress.Object{}}
	v.stopped.Go(func() {
		tick := time.NewTicker(progress.Interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				v.draw(false)
			case <-v.stop:
				v.draw(true)
				return
			}
		}
	})
	return v
}

// end draws the final frame.
func (v *view) end() {
	close(v.stop)
	v.stopped.Wait()
}

func (v *view) draw(last bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.display.Draw(v.objects, last)
}

// come returns how many bytes have come.
func (v *view) come() (bytes int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, o := range v.objects {
		bytes += min(o.Offset, o.Size)
	}
	return bytes
}

// Expect implements copygraph.Progress.
func (v *view) Expect(d v1.Descriptor) {
	v.mu.Lock()
	defer v.mu.Unlock()
	o := &progress.Object{Name: progress.Name(d), Size: max(d.Size, 0)}
	v.index[d.Digest] = o
	v.objects = append(v.objects, o)
}

// Move implements copygraph.Progress.
func (v *view) Move(dgst digest.Digest, offset int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	o := v.index[dgst]
	if o.State == progress.Waiting {
		o.State, o.First = progress.Moving, offset
	}
	o.Offset, o.First = offset, min(o.First, offset)
}

// Land implements copygraph.Progress.
func (v *view) Land(dgst digest.Digest, outcome copygraph.Outcome) {
	v.mu.Lock()
	defer v.mu.Unlock()
	o := v.index[dgst]
	switch outcome {
	case copygraph.Missing:
		return
	case copygraph.Stored:
		o.State = progress.Done
	default:
		o.State, o.First = progress.Exists, o.Size
	}
	o.Size = max(o.Size, o.Offset)
	o.Offset = o.Size
}
