package remotes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// mirrored returns a mirror, its upstream, and a function that opens their repository. All processes share a directory.
func mirrored(t *testing.T) (mirror, upstream *fake, start func(Options) *Registry) {
	runtimeDir(t)
	mirror, upstream = newFake(t), newFake(t)
	root := t.TempDir()
	writeHosts(t, root, "good.example", "server = '"+upstream.URL+"'\n[host.'"+mirror.URL+"']\n")
	return mirror, upstream, func(o Options) *Registry {
		o.HostsDir = root
		return open(t, "good.example", o)
	}
}

// If a mirror has wrong bytes, the blob is read from the next host: immediately if no bytes were written yet, or else
// by the next process.
func TestCorruptMirror(t *testing.T) {
	for _, size := range []int{1, 1000, pieceSize - 1, pieceSize, pieceSize + 1, 5 << 20} {
		for _, o := range []Options{{}, {Unverified: true}, {Parts: 4}, {Parts: 4, Unverified: true}} {
			for _, at := range []int{0, size - 1} {
				mirror, upstream, start := mirrored(t)
				content := noise(size)
				id := upstream.blob(content)
				wrong := slices.Clone(content)
				wrong[at] ^= 1
				mirror.blobs[digest.Digest(id)] = wrong
				name := fmt.Sprintf("%d bytes, %+v, wrong at %d", size, o, at)
				got, err := fetch(t, start(o), id)
				small := size <= pieceSize && o.Parts < 2 || size <= shortPiece
				switch {
				case small && (err != nil || !bytes.Equal(got, content)):
					t.Errorf("%s: %d bytes, %v", name, len(got), err)
				case !small && err == nil && !bytes.Equal(got, content):
					t.Errorf("%s: wrong bytes, and no error", name)
				case err != nil:
					is(t, err, errdefs.IsDataLoss)
					if len(got) >= size || !strings.Contains(err.Error(), mirror.host()) {
						t.Errorf("%s: %d bytes, %v", name, len(got), err)
					}
				}
				mirror.reset()
				if got, err := fetch(t, start(o), id); err != nil || !bytes.Equal(got, content) || mirror.count() != 0 {
					t.Errorf("%s, again: %d bytes, %v, mirror %q", name, len(got), err, mirror.seen())
				}
				// Other blobs are still read from the mirror.
				other := mirror.blob([]byte("other"))
				if _, err := fetch(t, start(o), other); err != nil || mirror.count() == 0 {
					t.Errorf("%s: another blob: %v", name, err)
				}
			}
		}
	}
}

// If a mirror has a wrong manifest, a wrong size or an incomplete small blob, the next host is asked, too.
func TestMirrorFallsThrough(t *testing.T) {
	manifest := []byte(tinyManifest)
	content := noise(1000)
	for name, fault := range map[string]func(w http.ResponseWriter, r *http.Request, n int) bool{
		"wrong bytes": func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Write([]byte(`{"schemaVersion":2,"layers":[{}]}`))
			return true
		},
		"html":  func(w http.ResponseWriter, r *http.Request, n int) bool { w.Write([]byte("<html>")); return true },
		"empty": func(w http.ResponseWriter, r *http.Request, n int) bool { return true },
		"cut":   func(w http.ResponseWriter, r *http.Request, n int) bool { cut(w, content, 10); return true },
		"closed": func(w http.ResponseWriter, r *http.Request, n int) bool {
			panic(http.ErrAbortHandler)
		},
		"unauthorized": func(w http.ResponseWriter, r *http.Request, n int) bool { w.WriteHeader(401); return true },
		"busy":         func(w http.ResponseWriter, r *http.Request, n int) bool { w.WriteHeader(503); return true },
		"redirect": func(w http.ResponseWriter, r *http.Request, n int) bool {
			http.Redirect(w, r, "ftp://x/", http.StatusFound)
			return true
		},
	} {
		mirror, upstream, start := mirrored(t)
		mirror.reply(fault)
		m := upstream.manifest("latest", ocispec.MediaTypeImageManifest, manifest)
		id := upstream.blob(content)
		r := start(Options{})
		for _, hints := range [][]string{nil, {"mediatype:" + m.MediaType}, {fmt.Sprintf("size:%d", m.Size)}} {
			if got, err := fetch(t, r, m.Digest.String(), hints...); err != nil || !bytes.Equal(got, manifest) {
				t.Errorf("%s: manifest %q: %.80q, %v", name, hints, got, err)
			}
		}
		for _, hints := range [][]string{nil, {"size:1000"}, {"mediatype:a/b"}} {
			if got, err := fetch(t, r, id, hints...); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%s: blob %q: %d bytes, %v", name, hints, len(got), err)
			}
		}
	}
}

// downFiles counts the files that record that a host is down, and sets the time until which they are valid.
func downFiles(t *testing.T, by time.Duration) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(sharedDir(), "down-*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		tv := unix.NsecToTimeval(time.Now().Add(by).UnixNano())
		if err := unix.Utimes(f, []unix.Timeval{tv, tv}); err != nil {
			t.Fatal(err)
		}
	}
	return len(files)
}

// Only one process waits for a mirror that is down. When the recorded time is over, one process tries it again.
func TestMirrorIsDown(t *testing.T) {
	for name, fault := range map[string]func(w http.ResponseWriter, r *http.Request, n int) bool{
		"no reply": func(w http.ResponseWriter, r *http.Request, n int) bool { <-r.Context().Done(); return true },
		"closed":   func(w http.ResponseWriter, r *http.Request, n int) bool { panic(http.ErrAbortHandler) },
		"stalls": func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Content-Length", "1000")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return true
		},
	} {
		mirror, upstream, start := mirrored(t)
		mirror.reply(fault)
		upstream.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		mirror.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		get := func(object string) {
			t.Helper()
			r := start(Options{Timeout: 100 * time.Millisecond})
			if _, err := fetch(t, r, object); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for range 3 {
			get("latest")
		}
		if mirror.count() != 1 || upstream.count() != 3 {
			t.Errorf("%s: mirror %q, upstream %q", name, mirror.seen(), upstream.seen())
		}
		// When the time is over, one of the processes tries the mirror.
		if n := downFiles(t, -time.Second); n != 1 {
			t.Errorf("%s: %d files", name, n)
		}
		for range 3 {
			get("latest")
		}
		if mirror.count() != 2 {
			t.Errorf("%s: after a while: mirror %q", name, mirror.seen())
		}
		// The mirror is up again, and the others use it.
		mirror.reply(nil)
		downFiles(t, -time.Second)
		for range 3 {
			get("latest")
		}
		if mirror.count() != 3 {
			t.Errorf("%s: when it is back: mirror %q", name, mirror.seen())
		}
	}
	// Any reply shows that a host is up. The last host is asked in any case.
	mirror, upstream, start := mirrored(t)
	mirror.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { w.WriteHeader(500); return true })
	upstream.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { panic(http.ErrAbortHandler) })
	for range 2 {
		upstream.reset()
		_, err := fetch(t, start(Options{}), "latest")
		is(t, err, errdefs.IsAborted)
		if upstream.count() != maxTries {
			t.Errorf("%d requests", upstream.count())
		}
	}
	if n := downFiles(t, 0); n != 0 || mirror.count() != 2 {
		t.Errorf("%d files, mirror %q", n, mirror.seen())
	}
	// If the user interrupts the process, that says nothing about the host.
	mirror.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { <-r.Context().Done(); return true })
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := start(Options{}).Fetch(ctx, "latest"); !errors.Is(err, context.DeadlineExceeded) || downFiles(t, 0) != 0 {
		t.Errorf("%v, %d files", err, downFiles(t, 0))
	}
}

// The time without any data is limited over all attempts. A host that is slow to begin its reply is not asked five
// times.
func TestSilenceIsBounded(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	content := noise(100000)
	id := f.blob(content)
	silent := func(w http.ResponseWriter, r *http.Request, n int) bool { <-r.Context().Done(); return true }
	for _, method := range []string{"fetch", "resolve", "tags"} {
		f.reply(silent)
		r := open(t, f.host(), Options{Timeout: 50 * time.Millisecond})
		var err error
		switch method {
		case "fetch":
			_, err = fetch(t, r, id)
		case "resolve":
			_, err = r.Resolve(context.Background(), "latest")
		case "tags":
			_, err = tags(r)
		}
		is(t, err, errdefs.IsDeadlineExceeded)
		if f.count() != 1 || !strings.Contains(err.Error(), "50ms") {
			t.Errorf("%s: %q, %v", method, f.seen(), err)
		}
	}
	// The client waits longer for the beginning of a reply than for more bytes of one.
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		time.Sleep(300 * time.Millisecond)
		return false
	})
	r := open(t, f.host(), Options{Timeout: time.Minute})
	r.clients[0].stall = 100 * time.Millisecond
	if _, err := fetch(t, r, id); err != nil || f.count() != 1 {
		t.Errorf("slow to begin: %v, %q", err, f.seen())
	}
	// A reply that stops is requested again, until the total time without data is too long. Progress resets that time.
	r = open(t, f.host(), Options{})
	r.clients[0].stall, r.clients[0].timeout = 30*time.Millisecond, 80*time.Millisecond
	each := 0
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		from := 0
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
		w.Header().Set("Content-Length", fmt.Sprint(len(content)-from))
		if r.Header.Get("Range") != "" {
			w.WriteHeader(http.StatusPartialContent)
		}
		w.Write(content[from:min(len(content), from+each)])
		w.(http.Flusher).Flush()
		if from+each < len(content) {
			<-r.Context().Done()
		}
		return true
	})
	_, err := fetch(t, r, id)
	is(t, err, errdefs.IsDeadlineExceeded)
	if f.count() != 3 {
		t.Errorf("silence: %q", f.seen())
	}
	each = 10000
	if got, err := fetch(t, r, id); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
