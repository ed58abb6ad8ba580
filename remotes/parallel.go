package remotes

import (
	"context"
	"io"
	"sync"

	"github.com/containerd/errdefs"
)

// partsMemory is what the parts that wait for their turn may take together.
const partsMemory = 6 << 20

// parallel reads a blob in chunks over several connections and gives them in order. Worker w
// of n has the chunks w, w+n, w+2n, …, and memory for one: it goes on when that was read.
type parallel struct {
	ctx     context.Context
	cancel  context.CancelFunc
	done    sync.WaitGroup
	workers []worker
	turn    int
	at      int64 // the offset of the next byte
	end     int64 // of what is read
	current chunk
	err     error
}

type worker struct {
	full chan chunk
	free chan []byte
}

type chunk struct {
	buf, rest []byte
	err       error
}

// newParallel goes on with a reader whose span is the first chunk, up to an end: n chunks of the same
// length at a time. It takes the reader's context.
func newParallel(first *rangeReader, length int64, n int, end int64) *parallel {
	source := first.source
	p := &parallel{ctx: first.ctx, cancel: first.cancel, at: first.stream.at, end: end}
	first.cancel, first.tries = nil, source.client.newTries(maxTries)
	start := p.at
	for i := range int64(n) {
		if start+i*length >= p.end {
			break
		}
		w := worker{make(chan chunk), make(chan []byte, 1)}
		p.workers = append(p.workers, w)
		p.done.Go(func() {
			defer close(w.full)
			buf := make([]byte, length)
			for at := start + i*length; at < p.end; at += int64(n) * length {
				r := first
				if at != start {
					r = &rangeReader{ctx: first.ctx, source: source, tries: source.client.newTries(maxTries), end: min(at+length, p.end)}
				}
				select {
				case w.full <- r.readChunk(at, buf):
				case <-p.ctx.Done():
					return
				}
				select {
				case buf = <-w.free:
				case <-p.ctx.Done():
					return
				}
			}
		})
	}
	return p
}

// readChunk reads the reader's span, which begins at an offset, into buf.
func (r *rangeReader) readChunk(at int64, buf []byte) chunk {
	defer r.Close()
	c := chunk{buf: buf}
	if r.stream.ReadCloser == nil {
		c.err = r.connect(at, true, nil)
	}
	if c.err == nil {
		var n int
		n, c.err = io.ReadFull(r, buf[:min(r.end, r.source.size)-at])
		c.rest = buf[:n]
	}
	return c
}

func (p *parallel) Read(b []byte) (int, error) {
	for len(p.current.rest) == 0 {
		if p.err != nil {
			return 0, p.err
		}
		if p.current.buf != nil {
			p.workers[p.turn].free <- p.current.buf
			p.turn = (p.turn + 1) % len(p.workers)
		}
		var ok bool
		if p.current, ok = <-p.workers[p.turn].full; !ok || p.current.err == io.EOF {
			p.err = p.ended()
		} else if p.current.err != nil {
			p.err = p.current.err
		}
	}
	n := copy(b, p.current.rest)
	p.current.rest = p.current.rest[n:]
	p.at += int64(n)
	return n, nil
}

// ended returns io.EOF only if all has been read: workers stop before that when the context is done.
func (p *parallel) ended() error {
	if p.at == p.end {
		return io.EOF
	}
	if err := context.Cause(p.ctx); err != nil {
		return err
	}
	return classf(errdefs.ErrAborted, "the download ended after %d of %s", p.at, sizeString(p.end))
}

// Close stops the workers and waits for them.
func (p *parallel) Close() error {
	p.cancel()
	p.done.Wait()
	return nil
}
