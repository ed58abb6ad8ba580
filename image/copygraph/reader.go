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

// Bounds for the attempts at a source or target that fails temporarily.
const (
	maxIdle      = 3       // consecutive attempts without enough progress
	enough       = 4 << 10 // bytes that count as progress
	firstBackoff = 200 * time.Millisecond
)

// retry counts consecutive attempts without enough progress.
type retry struct {
	best    int64 // the largest offset of an attempt
	idle    int
	backoff time.Duration
}

// after waits, and reports whether to make another attempt. The last one began at offset begin, and failed with err at
// offset end.
func (r *retry) after(ctx context.Context, err error, begin, end int64) bool {
	if !temporary(err) {
		return false
	}
	progress := end-max(begin, r.best) >= enough // a part that the target merely claims to have is no progress
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

// temporary reports whether another attempt may succeed.
func temporary(err error) bool {
	return errdefs.IsAborted(err) || errdefs.IsDeadlineExceeded(err) && !errors.Is(err, context.DeadlineExceeded) || errdefs.IsResourceExhausted(err)
}

// reader reads an object, and no more bytes than its size. If its source fails temporarily, it reopens the source at
// the current offset, unless it is brittle.
type reader struct {
	ctx      context.Context
	o        *object
	from     Source
	limit    int64
	brittle  bool // fail as soon as the source does
	moved    func(offset int64)
	mu       sync.Mutex // a Read may still be running when ctx ends
	body     io.ReadCloser
	begin    int64 // the offset at which body was opened
	offset   int64
	attempts retry
	err      error
}

// reader returns a reader at the beginning of an object.
func (c *Copy) reader(ctx context.Context, o *object) *reader {
	r := &reader{ctx: ctx, o: o, from: c.From, limit: o.size, moved: func(int64) {}}
	if c.From == nil || o.stored {
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
			if r.brittle || !r.attempts.after(r.ctx, err, r.begin, r.offset) {
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
			return 0, io.EOF // the target had all bytes, and only verifies them
		}
		if err := r.open(); err != nil {
			return 0, err
		}
	}
	n, err := r.body.Read(p)
	switch end := r.offset + int64(n); {
	case end > r.limit:
		return 0, errclass.Errorf(errdefs.ErrDataLoss, "%s: the source has more than %d bytes", r.o.digest, r.limit)
	case err == io.EOF && end < r.o.size:
		return n, errclass.Errorf(errdefs.ErrAborted, "%s: the source ended after %d of %d bytes", r.o.digest, end, r.o.size)
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

// Seek implements io.Seeker. It supports only io.SeekStart, and io.SeekCurrent with offset 0.
func (r *reader) Seek(offset int64, whence int) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case whence == io.SeekCurrent && offset == 0:
	case whence == io.SeekStart && offset >= 0:
		r.stop()
		r.offset, r.attempts, r.err = offset, retry{}, nil
	default:
		return 0, errors.New("seek: only offsets from the beginning are supported")
	}
	return r.offset, nil
}

// end ends the reader. It returns the offset at which the source was last opened, and the offset reached. Read fails
// afterwards.
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
