package remotes

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// interrupted runs a process that puts content and dies when the registry has n bytes of it.
func interrupted(t *testing.T, f *fake, d digest.Digest, content io.Reader, n int64) {
	t.Helper()
	ctx, die := context.WithCancel(context.Background())
	var got int64
	f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.Method != http.MethodPut && r.Method != http.MethodPatch {
			return false
		}
		if got+r.ContentLength <= n {
			got += r.ContentLength
			return false
		}
		r.Body = io.NopCloser(io.LimitReader(r.Body, n-got))
		r.Method = http.MethodPatch
		f.store(httptest.NewRecorder(), r)
		die()
		panic(http.ErrAbortHandler)
	})
	if _, err := open(t, f.host(), Options{}).Push(ctx, d.String(), content); err == nil {
		t.Fatal("it was not interrupted")
	}
}

// counted makes the fake count the bytes that it receives.
func counted(f *fake) *int64 {
	var mu sync.Mutex
	var n int64
	f.reply(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.ContentLength > 0 {
			mu.Lock()
			n += r.ContentLength
			mu.Unlock()
		}
		return false
	})
	return &n
}

// The next process sends only the bytes that the one that died had not sent.
func TestPutResumed(t *testing.T) {
	content := noise(2*chunkSize + 100)
	d := digest.FromBytes(content)
	size := int64(len(content))
	for name, reader := range readers {
		for _, at := range []int64{0, 1, 2, 5000, chunkSize, chunkSize + 70, size} {
			f, shared := newFake(t), runtimeDir(t)
			if name == "pipe" && at == size {
				continue // its last request is the one that completes the upload
			}
			interrupted(t, f, d, reader(t, content), min(at, size-1))
			files, _ := filepath.Glob(filepath.Join(shared, "upload-*"))
			if len(files) != 1 {
				t.Fatalf("%s cut at %d: files: %q", name, at, files)
			}
			if info, _ := os.Stat(files[0]); info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", files[0], info.Mode())
			}
			n := counted(f)
			if _, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content)); err != nil {
				t.Fatalf("%s cut at %d: %v", name, at, err)
			}
			want := size - min(at, size-1)
			if at <= 1 {
				want = size // for zero bytes and for one byte a registry's reply is the same
			}
			if *n != want || !bytes.Equal(f.blobs[d], content) {
				t.Errorf("%s cut at %d: %d bytes were sent, not %d", name, at, *n, want)
			}
			if files, _ := filepath.Glob(filepath.Join(shared, "upload-*")); len(files) != 0 {
				t.Errorf("%s cut at %d: %q is left", name, at, files)
			}
		}
	}
}

// Saved uploads with various errors. The blob is stored in spite of them.
func TestPutResumedWrong(t *testing.T) {
	content := noise(chunkSize + 100)
	d := digest.FromBytes(content)
	spoil := map[string]func(f *fake, file string){
		"forgotten by the registry": func(f *fake, _ string) { clear(f.uploads) },
		"longer than the content":   func(f *fake, _ string) { f.uploads["1"] = noise(3 * chunkSize) },
		"of other content":          func(f *fake, _ string) { f.uploads["1"] = make([]byte, 5000) },
		"torn":                      func(_ *fake, file string) { os.Truncate(file, 10) },
		"of another scheme":         func(_ *fake, file string) { os.WriteFile(file, []byte(`{"url":"file:///etc/passwd"}`), 0o600) },
		"with a password":           func(_ *fake, file string) { os.WriteFile(file, []byte(`{"url":"http://a:b@127.0.0.1/"}`), 0o600) },
		"nowhere":                   func(_ *fake, file string) { os.WriteFile(file, []byte(`{"url":"http://127.0.0.1:1/"}`), 0o600) },
	}
	for what, spoil := range spoil {
		for name, reader := range readers {
			f, shared := newFake(t), runtimeDir(t)
			interrupted(t, f, d, reader(t, content), 5000)
			files, _ := filepath.Glob(filepath.Join(shared, "upload-*"))
			spoil(f, files[0])
			f.reply(nil)
			r := open(t, f.host(), Options{})
			_, err := r.Push(context.Background(), d.String(), reader(t, content))
			if err != nil && name == "pipe" && what != "torn" {
				// Content that can be read only once is stored by the next attempt.
				if strings.HasPrefix(what, "of other") {
					is(t, err, errdefs.IsAborted)
				}
				_, err = r.Push(context.Background(), d.String(), reader(t, content))
			}
			if err != nil || !bytes.Equal(f.blobs[d], content) {
				t.Errorf("%s, %s: %v", what, name, err)
			}
		}
	}
}

// Ten callers that put the same blob have an upload each. Without a runtime directory nothing is saved.
func TestPutAtOnce(t *testing.T) {
	content := noise(chunkSize + 100)
	d := digest.FromBytes(content)
	f := newFake(t)
	runtimeDir(t)
	var wg sync.WaitGroup
	for range 10 {
		r := open(t, f.host(), Options{})
		wg.Go(func() {
			if _, err := r.Push(context.Background(), d.String(), pipe(t, content)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if !bytes.Equal(f.blobs[d], content) {
		t.Error("other bytes came")
	}
	t.Setenv("XDG_RUNTIME_DIR", "")
	f = newFake(t)
	interrupted(t, f, d, file(t, content), 5000)
	n := counted(f)
	if _, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), file(t, content)); err != nil || *n != int64(len(content)) {
		t.Errorf("%d bytes were sent: %v", *n, err)
	}
}

// A caller with another login does not continue the upload.
func TestPutResumedLogin(t *testing.T) {
	content := noise(100000)
	d := digest.FromBytes(content)
	f := newFake(t)
	runtimeDir(t)
	interrupted(t, f, d, file(t, content), 5000)
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	n := counted(f)
	if _, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), file(t, content)); err != nil || *n != int64(len(content)) {
		t.Errorf("%d bytes were sent: %v", *n, err)
	}
}
