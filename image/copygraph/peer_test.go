package copygraph_test

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"distkit/batch"
	"distkit/errclass"
	"distkit/image/copygraph"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestServers(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := index(t, from, noise(t, from, 5), nested(t, from))
	for what, c := range map[string]struct {
		// fails makes the nth run of a server fail. The server writes to out.
		fails  func(n int64, out io.Writer) error
		starts int64 // at least
		failed func(error) bool
	}{
		"all is well": {func(int64, io.Writer) error { return nil }, 1, nil},
		"it ends in an answer": {func(n int64, out io.Writer) error {
			if n > 2 {
				return nil
			}
			_, err := out.Write([]byte("o"))
			return errclass.Errorf(errdefs.ErrAborted, "the first two runs fail: %w", err)
		}, 3, nil},
		"it is not allowed to": {func(int64, io.Writer) error { return errclass.Errorf(errdefs.ErrPermissionDenied, "no") }, 1, errdefs.IsPermissionDenied},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			middle, to := open(t), open(t)
			var starts atomic.Int64
			server := copygraph.FromServer(func(_ context.Context, in io.Reader, out io.Writer) error {
				if err := c.fails(starts.Add(1), out); err != nil {
					return err
				}
				return answer(from, in, out)
			}, nil)
			got, err := records(t, &copygraph.Copy{Documents: middle, From: server, To: copygraph.IntoStore(middle)}, root)
			if cerr := server.Close(); cerr != nil && c.failed == nil || starts.Load() != c.starts {
				t.Errorf("close: %v, %d starts", cerr, starts.Load())
			}
			if c.failed != nil {
				if err == nil || !c.failed(err) {
					t.Error(err)
				}
				return
			}
			if err != nil || count(got, copygraph.Stored) != len(got) {
				t.Errorf("%v, %v", got, err)
			}
			whole(t, middle, root)
			target := copygraph.IntoServer(func(_ context.Context, in io.Reader, out io.Writer) error { return answer(to, in, out) })
			if got, err = records(t, &copygraph.Copy{Documents: middle, To: target}, root); err != nil || count(got, copygraph.Stored) != len(got) {
				t.Errorf("%v, %v", got, err)
			}
			if err := target.Close(); err != nil {
				t.Error(err)
			}
			whole(t, to, root)
		})
	}
}

// A target's server may fail when it ends. A server that does not respond is ended with the copy.
func TestEndsOfServers(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	to := open(t)
	target := copygraph.IntoServer(func(_ context.Context, in io.Reader, out io.Writer) error {
		if err := answer(to, in, out); err != nil {
			return err
		}
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "it is full")
	})
	if _, err := records(t, &copygraph.Copy{Documents: from, To: target}, root); err != nil {
		t.Error(err)
	}
	if err := target.Close(); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	silent := copygraph.FromServer(func(ctx context.Context, in io.Reader, _ io.Writer) error {
		defer close(ended)
		_, _ = in.Read(make([]byte, 1))
		cancel()
		<-ctx.Done()
		return context.Cause(ctx)
	}, nil)
	stored := open(t)
	g := &copygraph.Copy{Documents: stored, From: silent, To: copygraph.IntoStore(stored)}
	if err := g.Run(ctx, root); err == nil {
		t.Error("it has copied from a server that did not answer")
	}
	<-ended
	_ = silent.Close()
}

// giddy is a target that accepts the beginning of one layer and then fails with a temporary error.
type giddy struct {
	copygraph.Target
	failed atomic.Bool
}

func (g *giddy) Put(ctx context.Context, o copygraph.Object, r io.ReadSeeker) (copygraph.Outcome, error) {
	if o.Size > 100_000 && g.failed.CompareAndSwap(false, true) {
		_, _ = io.ReadFull(r, make([]byte, 1000))
		return "", errclass.Errorf(errdefs.ErrAborted, "not now")
	}
	return g.Target.Put(ctx, o, r)
}

// A put with a temporary failure ends a server that is sending several objects. All of them are requested again.
func TestAServerThatIsStopped(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := noise(t, from, 12)
	for range 5 {
		documents, to := open(t), open(t)
		server := copygraph.FromServer(func(_ context.Context, in io.Reader, out io.Writer) error { return answer(from, in, out) }, nil)
		target := copygraph.IntoServer(func(_ context.Context, in io.Reader, out io.Writer) error { return answer(to, in, out) })
		if _, err := records(t, &copygraph.Copy{Documents: documents, From: server, To: &giddy{Target: target}}, root); err != nil {
			t.Error(err)
		}
		_ = server.Close()
		if err := target.Close(); err != nil {
			t.Error(err)
		}
		whole(t, to, root)
	}
}

// If a server supports Fetch, blobs are read by it: a bounded number at the same time, and after a break from the
// offset that was reached.
func TestBlobsComeByFetch(t *testing.T) {
	t.Parallel()
	from, to := open(t), open(t)
	root := index(t, from, noise(t, from, 3*batch.Ahead), nested(t, from))
	var running, most, blobs, cuts atomic.Int64
	var isFull sync.Once
	full := make(chan struct{}) // closed when as many run as are allowed
	server := func(_ context.Context, in io.Reader, out io.Writer) error { return answer(from, in, out) }
	fetch := func(_ context.Context, object string, hints ...string) (io.ReadCloser, error) {
		blobs.Add(1)
		n := running.Add(1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		if n == batch.Ahead {
			isFull.Do(func() { close(full) })
		}
		<-full
		time.Sleep(10 * time.Millisecond) // if one more were allowed, it would arrive in this time
		f, err := from.File(digest.Digest(object))
		if err != nil {
			return nil, err
		}
		cut := int64(1000)
		for _, hint := range hints {
			if n, err := batch.ParseNumber(strings.TrimPrefix(hint, "offset:")); err == nil {
				cut = -1
				if _, err := f.Seek(n, io.SeekStart); err != nil {
					return nil, err
				}
			}
		}
		b := struct {
			io.Reader
			io.Closer
		}{f, closer(func() error { running.Add(-1); return f.Close() })}
		if cut > 0 && f.Size() > cut {
			cuts.Add(1)
			b.Reader = io.MultiReader(io.LimitReader(f, cut), failing{fmt.Errorf("dial: %w", context.DeadlineExceeded)})
		}
		return b, nil
	}
	source := copygraph.FromServer(server, fetch)
	g := &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to), Jobs: 3 * batch.Ahead}
	if err := g.Run(t.Context(), root); err != nil {
		t.Error(err)
	}
	if err := source.Close(); err != nil {
		t.Error(err)
	}
	whole(t, to, root)
	if most.Load() > batch.Ahead || running.Load() != 0 || cuts.Load() == 0 || blobs.Load() <= cuts.Load() {
		t.Errorf("%d of %d blobs at a time, %d were cut, %d are open", most.Load(), blobs.Load(), cuts.Load(), running.Load())
	}
	failed := copygraph.FromServer(server, func(context.Context, string, ...string) (io.ReadCloser, error) {
		return nil, errclass.Errorf(errdefs.ErrPermissionDenied, "not for you")
	})
	to = open(t)
	if _, err := records(t, &copygraph.Copy{Documents: to, From: failed, To: copygraph.IntoStore(to)}, root); !errdefs.IsPermissionDenied(err) {
		t.Error(err)
	}
	_ = failed.Close()
}

type closer func() error

func (c closer) Close() error { return c() }
