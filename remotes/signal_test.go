package remotes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ondisk "distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// If the context ends during an operation, the result is an error, whatever the remote and the flags.
func TestFetchEndsWithItsContext(t *testing.T) {
	content := noise(9<<20 + 12345)
	id := digest.FromBytes(content).String()
	f := newFake(t)
	f.blob(content)
	dir := filepath.Join(t.TempDir(), "x")
	l := &Layout{dir: dir}
	if _, err := l.Push(context.Background(), id, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	remotes := map[string]Remote{
		"layout":               l,
		"helper":               helper(t, dir),
		"stream":               open(t, f.host(), Options{}),
		"unverified":           open(t, f.host(), Options{Unverified: true}),
		"parts":                open(t, f.host(), Options{Parts: 4}),
		"parts and unverified": open(t, f.host(), Options{Parts: 4, Unverified: true}),
	}
	for name, r := range remotes {
		for _, hints := range [][]string{nil, {"offset:10"}, {fmt.Sprintf("size:%d", len(content)), "offset:10"}} {
			for _, by := range []string{"read", "copy"} {
				ctx, cancel := context.WithCancelCause(context.Background())
				body, err := r.Fetch(ctx, id, hints...)
				if err != nil {
					t.Fatal(err)
				}
				// The consumer is slow, so all buffers before it are full when the signal arrives.
				var got int64
				stop := errors.New("stopped")
				w := writerFunc(func(p []byte) (int, error) {
					if got += int64(len(p)); got > 1000 {
						cancel(stop)
					}
					return len(p), nil
				})
				if by == "copy" {
					_, err = io.Copy(w, body)
				} else {
					_, err = io.Copy(w, struct{ io.Reader }{body})
				}
				body.Close()
				cancel(nil)
				if err == nil || !errors.Is(err, stop) && !errors.Is(err, context.Canceled) {
					t.Errorf("%s %v by %s: %d of %d bytes, and the error is %v", name, hints, by, got, len(content), err)
				}
			}
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Where nothing is hashed, only the length shows the end.
func TestLengthIsChecked(t *testing.T) {
	t.Parallel()
	content := noise(3 << 20)
	id := digest.FromBytes(content)
	for _, n := range []int{0, 1, len(content) - 1, len(content)} {
		for _, begin := range []int64{0, 1} {
			v := newVerifier(context.Background(), io.NopCloser(bytes.NewReader(content[min(int(begin), n):n])), id, begin, begin, int64(len(content)))
			v.hash = nil
			got, err := io.ReadAll(v)
			if n == len(content) {
				if err != nil || len(got) != n-int(begin) {
					t.Errorf("%d bytes from %d: %d, %v", n, begin, len(got), err)
				}
				continue
			}
			is(t, err, errdefs.IsDataLoss)
			if len(got) >= n && n > 0 {
				t.Errorf("%d bytes: all were given before the error", n)
			}
		}
	}
	// A file becomes shorter while it is read.
	dir := t.TempDir()
	l := &Layout{dir: dir}
	if _, err := l.Push(context.Background(), id.String(), bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	body, err := l.Fetch(context.Background(), id.String(), "offset:1")
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	file := filepath.Join(dir, ondisk.BlobName(id))
	if err := errors.Join(os.Chmod(file, 0o600), os.Truncate(file, 2<<20)); err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, body)
	is(t, err, errdefs.IsDataLoss)
	// If the reply has no length, only the digest shows the end.
	f := newFake(t)
	f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
			conn.Write(content[:len(content)/2])
			conn.Close()
		}
		return true
	})
	_, err = fetch(t, open(t, f.host(), Options{Unverified: true}), id.String())
	is(t, err, errdefs.IsDataLoss)
}
