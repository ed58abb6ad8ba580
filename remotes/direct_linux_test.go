package remotes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// fetchToPipe copies an object to a pipe, which read empties, and tells how much of it nobody saw.
func fetchToPipe(t *testing.T, f Fetcher, id string, read func(io.Reader), hints ...string) (unseen int64, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	body, err := f.Fetch(ctx, id, hints...)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer r.Close()
		read(r)
	}()
	_, err = io.Copy(w, body)
	w.Close()
	<-done
	if v, ok := body.(named).body.(*verifier); ok && v.unseen != nil && v.unseen.direct != nil {
		unseen = v.unseen.direct.sent
	}
	return unseen, err
}

func into(b *bytes.Buffer) func(io.Reader) {
	return func(r io.Reader) { _, _ = b.ReadFrom(r) }
}

func TestToAPipe(t *testing.T) {
	f := newFake(t)
	r := open(t, f.host(), Options{Unverified: true})
	for _, size := range []int{0, 1, readBuffer, readBuffer + 1, 5<<20 + 7} {
		content := noise(size)
		id := f.blob(content)
		for _, offset := range []int{0, size / 2, size} {
			var got bytes.Buffer
			unseen, err := fetchToPipe(t, r, id, into(&got), fmt.Sprintf("offset:%d", offset))
			if err != nil || !bytes.Equal(got.Bytes(), content[offset:]) {
				t.Fatalf("size %d from %d: got %d bytes, %v", size, offset, got.Len(), err)
			}
			if size > 1<<20 && offset < size && unseen < int64(size-offset)-2*pipeRead {
				t.Errorf("size %d from %d: %d bytes went by the kernel alone", size, offset, unseen)
			}
		}
	}
	for i := range f.count() {
		if f.request(i).RemoteAddr != f.request(0).RemoteAddr {
			t.Fatalf("request %d came by another connection", i)
		}
	}
	// Who wants it verified must see it.
	id := f.blob(noise(4 << 20))
	var got bytes.Buffer
	if unseen, err := fetchToPipe(t, open(t, f.host(), Options{}), id, into(&got)); err != nil || got.Len() != 4<<20 || unseen > 0 {
		t.Errorf("verified: %d bytes, %d unseen, %v", got.Len(), unseen, err)
	}
}

func TestToAPipeCut(t *testing.T) {
	f := newFake(t)
	content := noise(2 << 20)
	id := f.blob(content)
	r := open(t, f.host(), Options{Unverified: true})
	for _, n := range []int{0, 1, readBuffer - 1, readBuffer, 300000, 1 << 20, 2<<20 - 1} {
		first := true
		f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if first {
				first = false
				cut(w, content, n)
			}
			return false
		})
		var got bytes.Buffer
		if _, err := fetchToPipe(t, r, id, into(&got)); err != nil || !bytes.Equal(got.Bytes(), content) {
			t.Fatalf("cut at %d: got %d bytes, %v", n, got.Len(), err)
		}
	}
	// A body that no length is told of, one that is longer than was said, and one by TLS.
	f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		w.(http.Flusher).Flush()
		_, _ = w.Write(content)
		return true
	})
	var got bytes.Buffer
	if unseen, err := fetchToPipe(t, r, id, into(&got)); err != nil || !bytes.Equal(got.Bytes(), content) || unseen > 0 {
		t.Errorf("chunked: got %d bytes, %d unseen, %v", got.Len(), unseen, err)
	}
	got.Reset()
	if _, err := fetchToPipe(t, r, id, into(&got), "size:1000000"); !errdefs.IsDataLoss(err) || got.Len() > 1000000+pipeRead {
		t.Errorf("longer than was said: got %d bytes, %v", got.Len(), err)
	}
}

func TestToASlowPipe(t *testing.T) {
	f := newFake(t)
	content := noise(32 << 20) // more than the pipe holds, whose places can have 64 KiB each
	id := f.blob(content)
	r := open(t, f.host(), Options{Unverified: true})
	r.clients[0].stall = time.Second
	var got bytes.Buffer
	_, err := fetchToPipe(t, r, id, func(p io.Reader) {
		time.Sleep(3 * r.clients[0].stall)
		_, _ = got.ReadFrom(p)
	})
	if err != nil || !bytes.Equal(got.Bytes(), content) || f.count() != 1 {
		t.Errorf("who reads late: %d bytes, %d requests, %v", got.Len(), f.count(), err)
	}
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		_, _ = w.Write(content[:200000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	r.clients[0].stall = 20 * time.Millisecond
	if _, err := fetchToPipe(t, r, id, into(&got)); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("a stall: %v", err)
	}
}

func TestToABrokenPipe(t *testing.T) {
	f := newFake(t)
	id := f.blob(noise(32 << 20)) // more than a wide pipe takes of what is moved into it
	r := open(t, f.host(), Options{Unverified: true})
	_, err := fetchToPipe(t, r, id, func(p io.Reader) { _, _ = io.CopyN(io.Discard, p, 100000) })
	if !errors.Is(err, syscall.EPIPE) || f.count() != 1 {
		t.Errorf("%d requests, %v", f.count(), err)
	}
}
