package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

// heldBack is how much of the end is not passed on before the whole is verified: enough that
// whoever reads an archive or a compressed stream misses its end.
const heldBack = 64 << 10

// tee passes on what is stored, in its own time: a slow reader doesn't slow the ingest down,
// the file is the buffer.
type tee struct {
	file *os.File

	mu    sync.Mutex
	cond  *sync.Cond
	limit int64 // may be passed on up to here
	end   int64 // is complete at this size; -1: not yet
	sent  int64
	sum   hash.Hash // of what was sent
	check bool      // a second attempt has yet to show that it begins as the first did
	err   error
	quit  bool
	done  chan struct{}
}

func newTee() *tee {
	t := &tee{end: -1, sum: sha256.New(), done: make(chan struct{})}
	t.cond = sync.NewCond(&t.mu)
	return t
}

// follow begins to pass on the file from its start, as far as advance and finish allow.
func (t *tee) follow(f *os.File) {
	t.file = f
	go func() {
		defer close(t.done)
		buf := make([]byte, 256<<10)
		for {
			n := t.next(buf)
			if n == 0 {
				return
			}
			// Past the command's buffer, which is not for use beside the main goroutine.
			if _, err := os.Stdout.Write(buf[:n]); err != nil {
				t.fail(fmt.Errorf("write standard output: %w", disk.Cause(err)))
				return
			}
		}
	}()
}

// next waits for bytes that may be passed on; none are left when it gives 0.
func (t *tee) next(buf []byte) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.err == nil && !t.quit && t.sent >= t.limit && t.end != t.sent {
		t.cond.Wait()
	}
	if t.err != nil || t.quit || t.sent >= t.limit {
		return 0
	}
	n, err := t.file.ReadAt(buf[:min(int64(len(buf)), t.limit-t.sent)], t.sent)
	if n == 0 {
		t.err = fmt.Errorf("read back what is stored: %w", err)
		return 0
	}
	t.sum.Write(buf[:n])
	t.sent += int64(n)
	return n
}

func (t *tee) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
}

// advance tells how much is stored, and gives the error that ended the tee, if one did.
func (t *tee) advance(stored int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.compare(stored, false); err != nil {
		return err
	}
	if !t.check {
		t.limit = max(t.limit, stored-heldBack)
		t.cond.Signal()
	}
	return t.err
}

// restart tells that what is stored is about to be thrown away.
func (t *tee) restart() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.limit, t.check = t.sent, t.sent > 0
}

// compare demands that a second attempt begins with what was sent of the first.
func (t *tee) compare(stored int64, complete bool) error {
	if !t.check || stored < t.sent && !complete {
		return nil
	}
	h := sha256.New()
	n, err := io.Copy(h, io.NewSectionReader(t.file, 0, t.sent))
	if err == nil && (n != t.sent || !bytes.Equal(h.Sum(nil), t.sum.Sum(nil))) {
		err = errclass.Errorf(errdefs.ErrDataLoss, "the content differs from what was written to standard output of it before")
	}
	t.check = false
	if t.err == nil {
		t.err = err
	}
	return t.err
}

// finish passes on the rest of a verified blob.
func (t *tee) finish(ctx context.Context, size int64) error {
	t.mu.Lock()
	if t.compare(size, true) == nil {
		t.limit, t.end = size, size
	}
	t.cond.Signal()
	t.mu.Unlock()
	select {
	case <-t.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil && t.sent != size {
		t.err = errors.New("write standard output: it ended early")
	}
	return t.err
}

// stop ends the tee where it is.
func (t *tee) stop() {
	t.mu.Lock()
	t.quit = true
	t.cond.Signal()
	t.mu.Unlock()
}
