package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// file is content that can be read again, and pipe is content that can't.
func file(t *testing.T, b []byte) io.Reader {
	t.Helper()
	name := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(name, append([]byte("before"), b...), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Seek(6, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	return f
}

func pipe(t *testing.T, b []byte) io.Reader { return iotest.HalfReader(bytes.NewReader(b)) }

var readers = map[string]func(*testing.T, []byte) io.Reader{"file": file, "pipe": pipe}

func TestPutBlob(t *testing.T) {
	t.Parallel()
	for name, reader := range readers {
		for _, size := range []int{0, 1, 1000, chunkSize - 1, chunkSize, chunkSize + 1} {
			f := newFake(t)
			content := noise(size)
			d := digest.FromBytes(content)
			r := open(t, f.host(), Options{})
			for _, hint := range []string{"-", "mediatype:" + ocispec.MediaTypeImageLayer} {
				desc, err := r.Push(context.Background(), d.String(), reader(t, content), hint, fmt.Sprintf("size:%d", size))
				if err != nil || desc.Digest != d || desc.Size != int64(size) {
					t.Fatalf("%s of %d: %+v, %v", name, size, desc, err)
				}
				if !bytes.Equal(f.blobs[d], content) {
					t.Fatalf("%s of %d: other bytes came", name, size)
				}
			}
			// If the object exists, the put succeeds without reading.
			f.reset()
			if p, err := r.Push(context.Background(), d.String(), iotest.ErrReader(io.ErrNoProgress)); err != nil || p.State != Exists {
				t.Fatalf("%+v, %v", p, err)
			}
			for _, s := range f.seen() {
				if !strings.HasPrefix(s, "HEAD ") {
					t.Errorf("of what is there: %s", s)
				}
			}
		}
	}
}

// Content with another digest or size is never stored, and its upload is cancelled.
func TestPutWrongBlob(t *testing.T) {
	t.Parallel()
	for name, reader := range readers {
		for _, size := range []int{1, 1000, chunkSize + 1000} {
			f := newFake(t)
			content := noise(size)
			r := open(t, f.host(), Options{})
			_, err := r.Push(context.Background(), digest.FromString("other").String(), reader(t, content))
			is(t, err, errdefs.IsDataLoss)
			_, err = r.Push(context.Background(), digest.FromBytes(content).String(), reader(t, content), fmt.Sprintf("size:%d", size+1))
			is(t, err, errdefs.IsDataLoss)
			_, err = r.Push(context.Background(), digest.FromBytes(content).String(), reader(t, content), fmt.Sprintf("size:%d", size-1))
			is(t, err, errdefs.IsDataLoss)
			if len(f.blobs) != 0 || len(f.uploads) != 0 {
				t.Errorf("%s of %d: %d blobs and %d uploads are left", name, size, len(f.blobs), len(f.uploads))
			}
			broken := io.MultiReader(bytes.NewReader(content[:size/2]), iotest.ErrReader(io.ErrNoProgress))
			_, err = r.Push(context.Background(), digest.FromBytes(content).String(), broken)
			if err == nil || isTemporary(err) || !strings.Contains(err.Error(), io.ErrNoProgress.Error()) {
				t.Errorf("a reader that fails: %v", err)
			}
		}
	}
}

// An interrupted upload continues at the offset that the registry states.
func TestPutCut(t *testing.T) {
	t.Parallel()
	content := noise(chunkSize + 2<<20)
	d := digest.FromBytes(content)
	for name, reader := range readers {
		for _, at := range []int{0, 1, 5000, 1 << 20, chunkSize - 1} {
			f := newFake(t)
			cuts := 3
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if r.Method != http.MethodPut && r.Method != http.MethodPatch || r.ContentLength <= int64(at) || cuts == 0 {
					return false
				}
				cuts--
				// A part of the body arrives, and then the connection ends.
				r.Body = io.NopCloser(io.LimitReader(r.Body, int64(at)))
				r.Method = http.MethodPatch
				f.store(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			})
			if _, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content)); err != nil {
				t.Fatalf("%s cut at %d: %v", name, at, err)
			}
			if !bytes.Equal(f.blobs[d], content) {
				t.Fatalf("%s cut at %d: other bytes came", name, at)
			}
		}
	}
}

// If a registry forgets an upload, a new one is started, or the whole content is sent again, if that is possible.
func TestPutForgotten(t *testing.T) {
	t.Parallel()
	content := noise(2*chunkSize + 5)
	d := digest.FromBytes(content)
	for name, reader := range readers {
		for first, reply := range []string{"", `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}`} {
			f := newFake(t)
			forgotten := 0
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if r.Method != http.MethodPut && r.Method != http.MethodPatch || forgotten > 0 {
					return false
				}
				forgotten++
				f.mu.Lock()
				clear(f.uploads)
				f.mu.Unlock()
				w.WriteHeader(http.StatusNotFound - 4*first)
				fmt.Fprint(w, reply)
				return true
			})
			_, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content))
			if err != nil || !bytes.Equal(f.blobs[d], content) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	// In the middle of a pipe the content can't be sent again.
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		if strings.HasPrefix(r.Header.Get("Content-Range"), fmt.Sprint(chunkSize)) {
			clear(f.uploads)
		}
		return false
	})
	_, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), pipe(t, content))
	is(t, err, errdefs.IsAborted)
}

// The reply to the last request is lost, but the blob is stored.
func TestPutReplyLost(t *testing.T) {
	content := noise(100000)
	d := digest.FromBytes(content)
	for name, reader := range readers {
		f := newFake(t)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method == http.MethodPut {
				f.store(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			}
			return false
		})
		if _, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), reader(t, content)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPutDown(t *testing.T) {
	content := noise(100000)
	for name, reader := range readers {
		f := newFake(t)
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if r.Method == http.MethodPut {
				panic(http.ErrAbortHandler)
			}
			return false
		})
		_, err := open(t, f.host(), Options{}).Push(context.Background(), digest.FromBytes(content).String(), reader(t, content))
		t.Log(name)
		is(t, err, errdefs.IsAborted)
	}
}

func TestPutTooLargeForProxy(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	content := noise(2*chunkSize + 5)
	d := digest.FromBytes(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.ContentLength > chunkSize {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return true
		}
		return false
	})
	if _, err := open(t, f.host(), Options{}).Push(context.Background(), d.String(), file(t, content)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(f.blobs[d], content) {
		t.Error("other bytes came")
	}
}

func TestPutMount(t *testing.T) {
	f := newFake(t)
	d := digest.FromString("x").String()
	r := open(t, f.host(), Options{})
	if p, err := r.Push(context.Background(), d, iotest.ErrReader(io.ErrNoProgress), "mount:other", "mediatype:a/b"); err != nil || p.State != Mounted {
		t.Fatalf("%+v, %v", p, err)
	}
	// If the blob can't be mounted, it is uploaded.
	content := noise(100)
	d = digest.FromBytes(content).String()
	if p, err := r.Push(context.Background(), d, pipe(t, content), "mount:absent", "mediatype:a/b"); err != nil || p.State != Stored {
		t.Fatalf("%+v, %v", p, err)
	}
	if !bytes.Equal(f.blobs[digest.Digest(d)], content) {
		t.Error("other bytes came")
	}
	if got := f.request(-2).URL.RawQuery; !strings.Contains(got, "from=absent") {
		t.Errorf("asked with %s", got)
	}
}

func TestPutManifest(t *testing.T) {
	f := newFake(t)
	r := open(t, f.host(), Options{})
	content := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","layers":[],"config":{}}`)
	d := digest.FromBytes(content)
	for _, reader := range readers {
		for _, id := range []string{"v1", d.String()} {
			clear(f.manifests)
			desc, err := r.Push(context.Background(), id, reader(t, content), "-")
			if err != nil || desc.Digest != d || desc.Size != int64(len(content)) || desc.MediaType != ocispec.MediaTypeImageManifest {
				t.Fatalf("%s: %+v, %v", id, desc, err)
			}
			if got := f.manifests[id]; !bytes.Equal(got.content, content) || got.mediaType != ocispec.MediaTypeImageManifest {
				t.Errorf("%s: stored %+v", id, got)
			}
		}
	}
	for name, c := range map[string]struct {
		id, content, hint string
		class             func(error) bool
	}{
		"other digest": {digest.FromString("x").String(), string(content), "-", errdefs.IsDataLoss},
		"other size":   {"v2", string(content), "size:5", errdefs.IsDataLoss},
		"no JSON":      {"v2", "x", "mediatype:" + ocispec.MediaTypeImageManifest, errdefs.IsInvalidArgument},
		"no type":      {"v2", `{"schemaVersion":2}`, "-", errdefs.IsInvalidArgument},
		"too large":    {"v2", strings.Repeat(" ", MaxManifest+1), "-", errdefs.IsInvalidArgument},
		"empty":        {"v2", "", "-", errdefs.IsInvalidArgument},
	} {
		clear(f.manifests)
		_, err := r.Push(context.Background(), c.id, strings.NewReader(c.content), c.hint)
		t.Log(name)
		is(t, err, c.class)
		if len(f.manifests) != 0 {
			t.Errorf("%s was stored", name)
		}
	}
	// The registry stores other content.
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
		w.WriteHeader(http.StatusCreated)
		return true
	})
	_, err := r.Push(context.Background(), "v3", bytes.NewReader(content))
	is(t, err, errdefs.IsDataLoss)
}

// If the registry has no list of referrers, the client maintains one under a tag.
func TestPutReferrer(t *testing.T) {
	f := newFake(t)
	r := open(t, f.host(), Options{})
	subject := digest.FromString("subject")
	put := func(n int) {
		t.Helper()
		content := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"a/b","config":{},"layers":[],"subject":{"digest":%q},"annotations":{"n":"%d"}}`, ocispec.MediaTypeImageManifest, subject, n)
		if _, err := r.Push(context.Background(), digest.FromString(content).String(), strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	put(1)
	put(2)
	put(2)
	var index ocispec.Index
	if err := json.Unmarshal(f.manifests["sha256-"+subject.Encoded()].content, &index); err != nil {
		t.Fatal(err)
	}
	if len(index.Manifests) != 2 || index.Manifests[1].ArtifactType != "a/b" || index.Manifests[1].Annotations["n"] != "2" || index.SchemaVersion != 2 {
		t.Errorf("%+v", index)
	}
	f.referrers = true
	put(3)
	if err := json.Unmarshal(f.manifests["sha256-"+subject.Encoded()].content, &index); err != nil || len(index.Manifests) != 2 {
		t.Error("a registry that keeps the list was helped")
	}
}

// An upload follows a redirect to another origin without credentials, and never one from TLS to clear text.
func TestPutLocation(t *testing.T) {
	content := noise(1000)
	d := digest.FromBytes(content)
	var got []http.Header
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = append(got, r.Header)
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}))
	t.Cleanup(storage.Close)
	f := newFake(t)
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	location := storage.URL + "/upload?signature=x"
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("Www-Authenticate", `Basic realm="a registry"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if r.Method == http.MethodPost {
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusAccepted)
			return true
		}
		return false
	})
	hosts := t.TempDir()
	writeHosts(t, hosts, "_default", "server = '"+f.URL+"'\n[header]\nX-Key = 'secret'")
	r := open(t, f.host(), Options{HostsDir: hosts})
	if _, err := r.Push(context.Background(), d.String(), pipe(t, content)); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Get("Authorization") != "" || got[0].Get("X-Key") != "" {
		t.Errorf("the other origin got %v", got)
	}
	for _, location = range []string{"", "file:///etc/passwd", "http://user:word@127.0.0.1/", "http://[::1"} {
		_, err := r.Push(context.Background(), d.String(), pipe(t, content))
		is(t, err, errdefs.IsDataLoss)
	}

	s := newTLSFake(t)
	location = storage.URL
	to := func() string { return location }
	s.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Method == http.MethodPost {
			w.Header().Set("Location", to())
			w.WriteHeader(http.StatusAccepted)
		}
		return r.Method == http.MethodPost
	})
	root := trusting(t, s)
	location = strings.Replace(storage.URL, "127.0.0.1", "localhost", 1)
	_, err := open(t, s.host(), Options{HostsDir: root}).Push(context.Background(), d.String(), pipe(t, content))
	is(t, err, errdefs.IsDataLoss)
	// A registry behind a proxy that terminates TLS.
	s.mu.Lock()
	s.uploads["1"] = nil
	s.mu.Unlock()
	location = "http://" + s.host() + "/v2/x/blobs/uploads/1"
	if _, err := open(t, s.host(), Options{HostsDir: root}).Push(context.Background(), d.String(), pipe(t, content)); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(s.blobs[d], content) || len(got) != 1 {
		t.Error("other bytes came")
	}
}

func TestPutToken(t *testing.T) {
	k := newTokens(t)
	k.user = "me:word"
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	content := noise(100)
	d := digest.FromBytes(content)
	if _, err := open(t, k.host(), Options{}).Push(context.Background(), d.String(), pipe(t, content), "mediatype:a/b"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(k.blobs[d], content) {
		t.Error("other bytes came")
	}
	if len(k.forms) != 1 || !strings.Contains(k.forms[0], "pull%2Cpush") {
		t.Errorf("tokens were asked for with %q", k.forms)
	}
}

// Debian's docker-registry replies with a server error to a request for a manifest by a blob's digest.
func TestResolveBlobThatFailsAsManifest(t *testing.T) {
	f := newFake(t)
	id := f.blob(noise(10))
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.WriteHeader(http.StatusInternalServerError)
			return true
		}
		return false
	})
	if desc, err := open(t, f.host(), Options{}).Resolve(context.Background(), id); err != nil || desc.Size != 10 {
		t.Fatalf("%+v, %v", desc, err)
	}
	if got := f.seen(); !slices.Equal(got, []string{"HEAD /v2/x/manifests/" + id, "HEAD /v2/x/blobs/" + id}) {
		t.Errorf("asked %q", got)
	}
}
