package content_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// followedSize is the size of a blob that is larger than the part that a follower keeps back.
const followedSize = 300 << 10

// output is the part of a blob that a follower has written so far.
type output struct {
	mu   sync.Mutex
	cond *sync.Cond
	b    []byte
	done chan error
}

func newOutput() *output {
	o := &output{done: make(chan error, 1)}
	o.cond = sync.NewCond(&o.mu)
	return o
}

// follow starts a follower, which waits without a limit if it is to wait.
func follow(t *testing.T, s *content.Store, dgst digest.Digest, waits bool) *output {
	o := newOutput()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	go func() {
		defer close(ended)
		var wait func() bool
		if waits {
			wait = func() bool { return true }
		}
		o.done <- s.Follow(ctx, dgst, o, wait)
	}()
	return o
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b = append(o.b, p...)
	o.cond.Broadcast()
	return len(p), nil
}

// await waits until that many bytes have been written.
func (o *output) await(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.b) < n {
		o.cond.Wait()
	}
}

// check waits for the follower's end, and checks its error. A nil want means success.
func (o *output) check(t *testing.T, want []byte, class error) {
	t.Helper()
	err := <-o.done
	o.mu.Lock()
	defer o.mu.Unlock()
	if !errors.Is(err, class) || class == nil && !bytes.Equal(o.b, want) {
		t.Errorf("%v, not %v; %d bytes, which are right: %v", err, class, len(o.b), bytes.Equal(o.b, want))
	}
	if class != nil && bytes.Equal(o.b, want) {
		t.Errorf("all was written before it failed: %v", err)
	}
}

func write(t *testing.T, w *content.Writer, b []byte) {
	t.Helper()
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
}

func commit(t *testing.T, w *content.Writer) {
	t.Helper()
	if err := w.Commit(t.Context(), 0, "", nil); err != nil {
		t.Fatal(err)
	}
}

func blobWriter(t *testing.T, s *content.Store, dgst digest.Digest) *content.Writer {
	t.Helper()
	w, err := s.Writer(t.Context(), "ref", 0, dgst)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

// Followers that started before the store existed, and one that starts when all bytes have been received, write the
// blob as it arrives, except for its end.
func TestFollow(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, followedSize)
	early := []*output{follow(t, s, dgst, true), follow(t, s, dgst, true)}
	time.Sleep(5 * time.Millisecond) // so that the second look usually finds nothing, too
	w := blobWriter(t, s, dgst)
	write(t, w, b[:200<<10])
	late := follow(t, s, dgst, false)
	all := append(early, late)
	for _, o := range all {
		o.await(200<<10 - 64<<10)
	}
	write(t, w, b[200<<10:])
	for _, o := range all {
		o.await(followedSize - 64<<10)
		if len(o.b) != followedSize-64<<10 {
			t.Errorf("%d bytes were written before the blob was verified", len(o.b))
		}
	}
	commit(t, w)
	for _, o := range append(all, follow(t, s, dgst, false)) {
		o.check(t, b, nil)
	}
}

// Small and empty blobs are written only after they have been stored.
func TestFollowSmall(t *testing.T) {
	t.Parallel()
	for _, b := range [][]byte{nil, []byte("x")} {
		s, dgst := newStore(t), digest.FromBytes(b)
		w := blobWriter(t, s, dgst)
		write(t, w, b)
		o := follow(t, s, dgst, false)
		commit(t, w)
		o.check(t, b, nil)
	}
}

func TestFollowNothing(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, followedSize)
	follow(t, s, dgst, false).check(t, b, errdefs.ErrNotFound)
	_, other := random(t, followedSize)
	blobWriter(t, s, other)
	follow(t, s, dgst, false).check(t, b, errdefs.ErrNotFound)
	follow(t, s, "sha256:x", true).check(t, b, errdefs.ErrInvalidArgument)
}

// A follower that stops waiting looks for its blob once more.
func TestFollowWaitsNoLonger(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, followedSize)
	o := newOutput()
	err := s.Follow(t.Context(), dgst, o, func() bool {
		put(t, s, b)
		return false
	})
	if err != nil || !bytes.Equal(o.b, b) {
		t.Errorf("%v, %d bytes", err, len(o.b))
	}
	_, dgst = random(t, followedSize)
	left := 3
	err = s.Follow(t.Context(), dgst, o, func() bool {
		left--
		return left > 0
	})
	if !errors.Is(err, errdefs.ErrNotFound) || left != 0 {
		t.Errorf("%v, after %d calls", err, 3-left)
	}
}

// An ingest that starts again continues for its followers, if it brings the same bytes.
func TestFollowTruncated(t *testing.T) {
	t.Parallel()
	b, dgst := random(t, followedSize)
	wrong, _ := random(t, followedSize)
	for _, c := range []struct {
		first []byte
		class error
	}{{b, nil}, {wrong, errdefs.ErrDataLoss}} {
		s := newStore(t)
		w := blobWriter(t, s, dgst)
		write(t, w, c.first)
		o := follow(t, s, dgst, false)
		o.await(followedSize - 64<<10)
		if err := w.Truncate(0); err != nil {
			t.Fatal(err)
		}
		write(t, w, b[:100])
		write(t, w, b[100:])
		commit(t, w)
		o.check(t, b, c.class)
	}
}

// When an ingest is dropped, its followers fail, except those that wait for the next ingest.
func TestFollowAborted(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, followedSize)
	w := blobWriter(t, s, dgst)
	write(t, w, b)
	o, waits := follow(t, s, dgst, false), follow(t, s, dgst, true)
	o.await(1)
	waits.await(1)
	if err := w.Abort(); err != nil {
		t.Fatal(err)
	}
	o.check(t, b, errdefs.ErrAborted)
	w = blobWriter(t, s, dgst)
	write(t, w, b)
	commit(t, w)
	waits.check(t, b, nil)
}

// A writer that is killed leaves an ingest, which the next writer resumes. Some followers wait for that writer, and the
// others do not.
func TestFollowKilledWriter(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, followedSize)
	h := hold(t, s, string(dgst), dgst)
	h.write(b[:200<<10])
	o, waits := follow(t, s, dgst, false), follow(t, s, dgst, true)
	o.await(1)
	waits.await(1)
	h.kill()
	o.check(t, b, errdefs.ErrAborted)
	follow(t, s, dgst, false).check(t, b, errdefs.ErrAborted)
	w := blobWriter(t, s, dgst)
	if w.Offset() != 200<<10 {
		t.Errorf("it resumes at %d", w.Offset())
	}
	write(t, w, b[200<<10:])
	commit(t, w)
	waits.check(t, b, nil)
}

// Followers take no lock that would hinder a writer.
func TestFollowersHinderNoWriter(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	b, dgst := random(t, followedSize)
	var all []*output
	for range 4 {
		all = append(all, follow(t, s, dgst, true))
	}
	for i := range 50 {
		w := blobWriter(t, s, dgst)
		write(t, w, b[w.Offset():min(w.Offset()+1000, followedSize)])
		if i%10 == 9 {
			if err := w.Abort(); err != nil {
				t.Fatal(err)
			}
		} else if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	w := blobWriter(t, s, dgst)
	write(t, w, b[w.Offset():])
	commit(t, w)
	for _, o := range all {
		o.check(t, b, nil)
	}
}
