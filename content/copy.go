package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Copy copies src to dst until end-of-file. A read that brings little is passed on at once, so
// progress shows. When it fails, one Read of src may still be under way.
func Copy(ctx context.Context, dst io.Writer, src io.Reader) (int64, error) {
	n, _, err := copyAll(ctx, dst, src)
	return n, err
}

// copyAll is Copy; the channel is closed when src is read no more. It reads and writes by turns: what
// has just been read is hashed and stored while it is in the processor's cache, and a pipe reads ahead by
// itself.
func copyAll(ctx context.Context, dst io.Writer, src io.Reader) (int64, <-chan struct{}, error) {
	var (
		mu      sync.Mutex // of what follows, and of dst
		total   int64
		failed  error
		stopped bool
	)
	ended := make(chan struct{})
	write := func(p []byte, rerr error) (done bool) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return true
		}
		if len(p) > 0 {
			n, err := dst.Write(p)
			total += int64(n)
			if err != nil {
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
		b := make([]byte, chunk)
		for done := false; !done; {
			n, err := src.Read(b)
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
	return total, ended, failed
}

// WriteBlob stores what r holds and returns its digest. It waits for another writer of the same
// ingest. If the expected blob is there, r is not read. Otherwise WriteBlob resumes what an earlier
// attempt left, if expected is known and r is an io.Seeker or an io.ReaderAt, and begins anew if
// that turns out wrong; any other reader is read from its beginning. If r is an *os.File or a *[File],
// it is not copied where [Writer.CloneFrom] can do without. What fails verification (DataLoss) is thrown
// away; after any other failure it is kept.
func WriteBlob(ctx context.Context, s *Store, ref string, r io.Reader, size int64, expected digest.Digest) (digest.Digest, error) {
	w, err := s.Writer(ctx, ref, size, expected, Wait)
	if errdefs.IsAlreadyExists(err) {
		return expected, nil
	}
	if err != nil {
		return "", err
	}
	defer w.Close()

	begin := int64(0)
	seeker, seekable := r.(io.Seeker)
	if seekable {
		if begin, err = seeker.Seek(0, io.SeekCurrent); err != nil {
			seekable = false // a pipe in a file's clothes
		}
	}
	at, random := r.(io.ReaderAt)
	at = onlyIf(at, random && !seekable)
	src := r
	resumed := w.Offset() > 0
	switch {
	case !resumed:
	case expected != "" && seekable:
		if _, err := seeker.Seek(begin+w.Offset(), io.SeekStart); err != nil {
			return "", fmt.Errorf("ingest %s: %w", ref, err)
		}
	case expected != "" && at != nil:
		src = io.NewSectionReader(at, w.Offset(), 1<<62)
	default:
		resumed = false
		if err := w.Truncate(0); err != nil {
			return "", fmt.Errorf("ingest %s: %w", ref, err)
		}
	}
	for {
		var dgst digest.Digest
		cloned, err := false, error(nil)
		if !resumed {
			cloned, err = w.CloneFrom(ctx, r)
		}
		if err == nil && !cloned {
			var ended <-chan struct{}
			_, ended, err = copyAll(ctx, w, src)
			if ctx.Err() == nil {
				<-ended // r is the caller's again
			}
		}
		if err == nil {
			dgst = w.Digest()
			if expected != "" {
				dgst = expected
			}
			err = w.Commit(ctx, size, expected, nil)
		}
		switch {
		case err == nil, errdefs.IsAlreadyExists(err):
			return dgst, nil
		case !errdefs.IsDataLoss(err) && w.Offset() > 0:
			return "", err
		case !resumed:
			return "", errors.Join(err, w.Abort())
		}
		resumed = false
		if err := w.Truncate(0); err != nil {
			return "", fmt.Errorf("ingest %s: %w", ref, err)
		}
		if at != nil {
			src = io.NewSectionReader(at, 0, 1<<62)
		} else if _, err := seeker.Seek(begin, io.SeekStart); err != nil {
			return "", fmt.Errorf("ingest %s: %w", ref, err)
		}
	}
}

func onlyIf(at io.ReaderAt, ok bool) io.ReaderAt {
	if ok {
		return at
	}
	return nil
}
