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

// chunk is the unit of copying: large enough that system calls don't count, small enough that several fit into a cache.
const chunk = 256 << 10

// chunks keeps buffers for the next blob: to make a new one takes longer than to store a small blob.
var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// Copy copies src to dst until end-of-file. A read that brings little is passed on at once, so
// progress shows. When it fails, one Read of src may still be under way.
func Copy(ctx context.Context, dst io.Writer, src io.Reader) error {
	_, err := copyAll(ctx, dst, src)
	return err
}

// copyAll is Copy. ended is closed once src is no longer read. Reads and writes take turns: what has just been read is hashed
// and stored while it is in the processor's cache, and a pipe reads ahead by itself.
func copyAll(ctx context.Context, dst io.Writer, src io.Reader) (ended chan struct{}, failed error) {
	var (
		mu      sync.Mutex // of failed, stopped and dst
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

// WriteBlob stores what r holds and returns its digest. It waits for another writer of the same ingest. If the expected blob is
// there, r is not read. Otherwise it does what [Writer.Fill] does.
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

// Fill stores what r holds, commits it, closes the writer and returns the digest. It resumes what an earlier attempt left, if expected
// is known and r can seek, and begins anew if that turns out wrong; any other reader is read from its beginning. If r is an *os.File
// or a *[File], it is not copied where [Writer.CloneFrom] can do without. What fails verification (DataLoss) is thrown away; after any
// other failure what came is kept.
func (w *Writer) Fill(ctx context.Context, r io.Reader, size int64, expected digest.Digest) (digest.Digest, error) {
	defer w.Close()
	begin := int64(-1)
	var err error
	seeker, ok := r.(io.Seeker)
	if ok {
		if begin, err = seeker.Seek(0, io.SeekCurrent); err != nil {
			begin = -1 // an *os.File of a pipe
		}
	}
	// from makes r and the writer ready to go on at an offset.
	from := func(offset int64) error {
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
		if err := from(offset); err != nil {
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

// storeRest stores what is left of r, and commits it.
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
			<-ended // r is the caller's again
		}
		if err != nil {
			return "", err
		}
	}
	dgst := cmp.Or(expected, w.Digest())
	return dgst, w.Commit(ctx, size, expected, nil)
}
