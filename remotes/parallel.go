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
	at      int64 // the offset that the next byte has
	total   int64
	now     chunk
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

// newParallel goes on with a download that has its first chunk open, and takes its context.
// It reads to the blob's end, which the download knows.
func newParallel(first *download, size int64, n int) *parallel {
	ctx := first.ctx
	p := &parallel{ctx: ctx, cancel: first.cancel, at: first.at, total: first.size}
	first.cancel = nil
	total := first.size
	start := first.at
	for w := range int64(n) {
		if start+w*size >= total {
			break
		}
		k := worker{make(chan chunk), make(chan []byte, 1)}
		p.workers = append(p.workers, k)
		p.done.Go(func() {
			defer close(k.full)
			buf := make([]byte, size)
			for at := start + w*size; at < total; at += int64(n) * size {
				d := &download{ctx: ctx, client: first.client, request: first.request, size: total, end: min(at+size, total), whole: first.whole}
				d.tries = first.client.newTries(maxTries)
				c := chunk{buf: buf}
				if at == start {
					d = first
				} else {
					c.err = d.open(at)
				}
				if c.err == nil {
					c.err = d.skip(at)
				}
				if c.err == nil {
					var got int
					got, c.err = io.ReadFull(d, buf[:d.end-at])
					c.rest = buf[:got]
				}
				d.Close()
				select {
				case k.full <- c:
				case <-ctx.Done():
					return
				}
				select {
				case buf = <-k.free:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	return p
}

func (p *parallel) Read(b []byte) (int, error) {
	for len(p.now.rest) == 0 {
		if p.err != nil {
			return 0, p.err
		}
		if p.now.buf != nil {
			p.workers[p.turn].free <- p.now.buf
			p.turn = (p.turn + 1) % len(p.workers)
		}
		var ok bool
		if p.now, ok = <-p.workers[p.turn].full; !ok || p.now.err == io.EOF {
			p.err = p.end()
		} else if p.now.err != nil {
			p.err = p.now.err
		}
	}
	n := copy(b, p.now.rest)
	p.now.rest = p.now.rest[n:]
	p.at += int64(n)
	return n, nil
}

// end is io.EOF only if all has been read: workers stop before that when the context is done.
func (p *parallel) end() error {
	if p.at == p.total {
		return io.EOF
	}
	if err := context.Cause(p.ctx); err != nil {
		return err
	}
	return classf(errdefs.ErrAborted, "the download ended after %d of %s", p.at, sizeString(p.total))
}

// Close stops the workers and waits for them.
func (p *parallel) Close() error {
	p.cancel()
	p.done.Wait()
	return nil
}
