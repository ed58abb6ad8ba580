package content

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// chunk is the unit of copying. It is large enough to make system calls cheap by comparison, and small enough for the
// processor's cache.
const chunk = 256 << 10

// chunks recycles buffers, because allocating one takes longer than storing a small blob.
var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// Copy copies src to dst until end-of-file. It passes on short reads at once, so that progress shows. If ctx ends the
// copy, a Read of src may still be under way when Copy returns.
func Copy(ctx context.Context, dst io.Writer, src io.Reader) error {
	_, err := copyAll(ctx, dst, src)
	return err
}

// copyAll is Copy. ended is closed when src is no longer read.
//
// Reads and writes alternate rather than overlap: a chunk is hashed and stored while it is in the processor's cache,
// and a pipe reads ahead by itself.
func copyAll(ctx context.Context, dst io.Writer, src io.Reader) (ended chan struct{}, failed error) {
	var (
		mu      sync.Mutex // guards failed, stopped and writes to dst
		stopped bool
	)
	ended = make(chan struct{})
	write := func(p []byte, rerr error) (done bool) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return true
		}
		if len(p) > 0 {
			if _, err := dst.Write(p); err != nil {
				rerr = err
			}
		}
		if rerr != nil && rerr != io.EOF {
			failed = rerr
		}
		return rerr != nil
	}
	go func() {
		defer close(ended)
		b := chunks.Get().(*[chunk]byte)
		defer chunks.Put(b)
		for done := false; !done; {
			n, err := src.Read(b[:])
			done = write(b[:n], err)
		}
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		mu.Lock()
		defer mu.Unlock()
		stopped, failed = true, ctx.Err()
	}
	return ended, failed
}

// WriteBlob stores the content of r and returns its digest. It waits for another writer of the same ingest. If the
// expected blob is stored already, WriteBlob doesn't read r. Otherwise it does what [Writer.Fill] does.
func WriteBlob(ctx context.Context, s *Store, ref string, r io.Reader, size int64, expected digest.Digest) (digest.Digest, error) {
	w, err := s.Writer(ctx, ref, size, expected, Wait)
	if errdefs.IsAlreadyExists(err) {
		return expected, nil
	}
	if err != nil {
		return "", err
	}
	return w.Fill(ctx, r, size, expected)
}

// Fill stores the content of r, commits it and closes the writer. It returns the digest.
//
// If expected is given and r can seek, Fill resumes what an earlier attempt stored, and starts over once if the resumed
// data doesn't verify. Otherwise it reads r from its current offset and starts over. An *os.File or *[File] is not
// copied if [Writer.CloneFrom] can store it. Data that fails verification (DataLoss) is removed; after any other error
// it is kept for another attempt.
func (w *Writer) Fill(ctx context.Context, r io.Reader, size int64, expected digest.Digest) (digest.Digest, error) {
	defer w.Close()
	begin := int64(-1)
	var err error
	seeker, ok := r.(io.Seeker)
	if ok {
		if begin, err = seeker.Seek(0, io.SeekCurrent); err != nil {
			begin = -1 // an *os.File may be a pipe
		}
	}
	// seekTo positions r and the writer at an offset.
	seekTo := func(offset int64) error {
		var err error
		if offset < w.Offset() {
			err = w.Truncate(0)
		}
		if err == nil && begin >= 0 {
			_, err = seeker.Seek(begin+offset, io.SeekStart)
		}
		if err != nil {
			return fmt.Errorf("ingest %s: %w", w.ref, err)
		}
		return nil
	}
	offset := int64(0)
	if expected != "" && begin >= 0 {
		offset = w.Offset()
	}
	for {
		if err := seekTo(offset); err != nil {
			return "", err
		}
		dgst, err := w.storeRest(ctx, r, size, expected)
		switch {
		case err == nil, errdefs.IsAlreadyExists(err):
			return dgst, nil
		case errdefs.IsDataLoss(err) && offset > 0:
			offset = 0
		case errdefs.IsDataLoss(err), w.Offset() == 0:
			return "", errors.Join(err, w.Abort())
		default:
			return "", err
		}
	}
}

// storeRest stores the rest of r, and commits the blob.
func (w *Writer) storeRest(ctx context.Context, r io.Reader, size int64, expected digest.Digest) (digest.Digest, error) {
	cloned := false
	if w.offset == 0 {
		var err error
		if cloned, err = w.CloneFrom(ctx, r); err != nil {
			return "", err
		}
	}
	if !cloned {
		ended, err := copyAll(ctx, w, r)
		if ctx.Err() == nil {
			<-ended // from here on the caller may use r again
		}
		if err != nil {
			return "", err
		}
	}
	dgst := cmp.Or(expected, w.Digest())
	return dgst, w.Commit(ctx, size, expected, nil)
}
