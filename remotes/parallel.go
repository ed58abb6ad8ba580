package remotes

import (
	"context"
	"io"
	"sync"

	"github.com/containerd/errdefs"
)

// partsMemory bounds the memory of all parts together.
const partsMemory = 6 << 20

// parallel fetches the chunks of a blob over several connections, and returns them in order. Worker w of n fetches the
// chunks w, w+n, w+2n, …. It has memory for one chunk, and goes on when that has been read.
type parallel struct {
	ctx     context.Context
	cancel  context.CancelFunc
	done    sync.WaitGroup
	workers []worker
	turn    int
	offset  int64 // of the next byte
	end     int64 // of the part of the blob to read
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

// newParallel continues after a reader whose span is the first chunk, up to end, with n concurrent chunks of the same
// length. It takes over the reader's context.
func newParallel(first *rangeReader, length int64, n int, end int64) *parallel {
	source := first.source
	p := &parallel{ctx: first.ctx, cancel: first.cancel, offset: first.stream.offset, end: end}
	first.cancel, first.tries = nil, source.client.newTries(maxTries)
	start := p.offset
	for i := range int64(n) {
		if start+i*length >= p.end {
			break
		}
		w := worker{make(chan chunk), make(chan []byte, 1)}
		p.workers = append(p.workers, w)
		p.done.Go(func() {
			defer close(w.full)
			buf := make([]byte, length)
			for offset := start + i*length; offset < p.end; offset += int64(n) * length {
				r := first
				if offset != start {
					r = &rangeReader{ctx: first.ctx, source: source, tries: source.client.newTries(maxTries), end: min(offset+length, p.end)}
				}
				select {
				case w.full <- r.readChunk(offset, buf):
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

// readChunk reads the reader's span, which begins at offset, into buf.
func (r *rangeReader) readChunk(offset int64, buf []byte) chunk {
	defer r.Close()
	c := chunk{buf: buf}
	if r.stream.ReadCloser == nil {
		c.err = r.connect(offset, true, nil)
	}
	if c.err == nil {
		var n int
		n, c.err = io.ReadFull(r, buf[:min(r.end, r.source.size)-offset])
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
	p.offset += int64(n)
	return n, nil
}

// ended returns io.EOF only if everything was read, because workers stop early if the context ends.
func (p *parallel) ended() error {
	if p.offset == p.end {
		return io.EOF
	}
	if err := context.Cause(p.ctx); err != nil {
		return err
	}
	return classf(errdefs.ErrAborted, "the download ended after %d of %s", p.offset, sizeString(p.end))
}

// Close stops the workers, and waits for them.
func (p *parallel) Close() error {
	p.cancel()
	p.done.Wait()
	return nil
}
