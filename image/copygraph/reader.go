package copygraph

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"sync"
	"time"

	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
)

// These bound the attempts at a source or target that fails temporarily.
const (
	maxIdle      = 3       // attempts in a row that may bring less than enough
	enough       = 4 << 10 // bytes
	firstBackoff = 200 * time.Millisecond
)

// retry counts the attempts in a row that brought less than enough.
type retry struct {
	best    int64 // the farthest offset of an attempt
	idle    int
	backoff time.Duration
}

// after waits, and reports whether another attempt is worth making after one that began at an offset and failed at another.
func (r *retry) after(ctx context.Context, err error, begin, end int64) bool {
	if !temporary(err) {
		return false
	}
	progress := end-max(begin, r.best) >= enough // not a part that the target only says it has
	r.best = max(r.best, end)
	if progress || r.backoff == 0 {
		r.idle, r.backoff = 0, firstBackoff
	} else if r.idle++; r.idle >= maxIdle {
		return false
	}
	select {
	case <-time.After(r.backoff/2 + rand.N(r.backoff/2)):
	case <-ctx.Done():
		return false
	}
	r.backoff *= 2
	return true
}

// temporary reports whether an error is one that another attempt may cure.
func temporary(err error) bool {
	return errdefs.IsAborted(err) || errdefs.IsDeadlineExceeded(err) && !errors.Is(err, context.DeadlineExceeded) || errdefs.IsResourceExhausted(err)
}

// reader reads an object, and no more bytes than it may have. If its source fails temporarily, it opens the source again where
// that failed, unless it is brittle.
type reader struct {
	ctx     context.Context
	o       *object
	from    Source
	limit   int64
	brittle bool // fails with its source
	moved   func(offset int64)
	mu      sync.Mutex // a Read may still be under way when ctx is done
	body    io.ReadCloser
	begin   int64 // where the body was opened
	offset  int64
	again   retry
	err     error
}

// reader returns a reader at the beginning of an object.
func (c *Copy) reader(ctx context.Context, o *object) *reader {
	r := &reader{ctx: ctx, o: o, from: c.From, limit: o.size, moved: func(int64) {}}
	if c.From == nil || o.here {
		r.from = FromStore(c.Documents)
	}
	if o.size < 0 {
		r.limit = image.MaxDocument
	}
	if c.Progress != nil {
		r.moved = func(offset int64) { c.Progress.Move(o.digest, offset) }
	}
	return r
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.err == nil {
		n, err := r.attempt(p)
		if n > 0 {
			r.offset += int64(n)
			r.moved(r.offset)
		}
		if err != nil {
			r.stop()
			if r.brittle || !r.again.after(r.ctx, err, r.begin, r.offset) {
				r.err = err
			}
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// attempt reads once.
func (r *reader) attempt(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if r.body == nil {
		if r.offset == r.o.size {
			return 0, io.EOF // the target had all bytes, and only has to verify them
		}
		if err := r.open(); err != nil {
			return 0, err
		}
	}
	n, err := r.body.Read(p)
	switch at := r.offset + int64(n); {
	case at > r.limit:
		return 0, errclass.Errorf(errdefs.ErrDataLoss, "%s: the source has more than %d bytes", r.o.digest, r.limit)
	case err == io.EOF && at < r.o.size:
		return n, errclass.Errorf(errdefs.ErrAborted, "%s: the source ended after %d of %d bytes", r.o.digest, at, r.o.size)
	case err != nil && err != io.EOF:
		return n, fmt.Errorf("%s: %w", r.o.digest, err)
	}
	return n, err
}

// open opens the source at the offset, in the object's turn.
func (r *reader) open() (err error) {
	if err := r.o.wait(r.ctx); err != nil {
		return err
	}
	r.begin = r.offset
	r.body, err = r.from.Open(r.ctx, r.o.descriptor(), r.offset, r.o.pass)
	r.o.pass()
	if err != nil {
		return fmt.Errorf("%s: %w", r.o.digest, err)
	}
	r.moved(r.offset)
	return nil
}

// Seek implements io.Seeker. It sets an offset from the beginning, or returns the one that it has.
func (r *reader) Seek(offset int64, whence int) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case whence == io.SeekCurrent && offset == 0:
	case whence == io.SeekStart && offset >= 0:
		r.stop()
		r.offset, r.again, r.err = offset, retry{}, nil
	default:
		return 0, errors.New("seek: only from the beginning")
	}
	return r.offset, nil
}

// end ends the reader, and returns where it began to read and the offset that it has reached. A later Read fails.
func (r *reader) end() (begin, offset int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stop()
	r.err = fs.ErrClosed
	return r.begin, r.offset
}

func (r *reader) stop() {
	if r.body != nil {
		_ = r.body.Close()
		r.body = nil
	}
}
