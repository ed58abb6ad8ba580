package serve

import (
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/image"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func damage(t *testing.T, path string) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func writable(t *testing.T) fixture {
	s := newServer(t)
	s.Writable = true
	return start(t, s, 20)
}

// begin starts an upload, and returns its path.
func (f fixture) begin(repository string) string {
	f.Helper()
	return f.want(f.do("POST", "/v2/"+repository+"/blobs/uploads/", ""), 202, "").header.Get("Location")
}

// ingests counts the uploads in the store.
func (f fixture) ingests(want int) {
	f.Helper()
	list, err := f.Store.ListStatuses(f.Context())
	if err != nil || len(list) != want {
		f.Errorf("%d ingests, not %d: %v, %v", len(list), want, list, err)
	}
}

func TestPushBlob(t *testing.T) {
	t.Parallel()
	f := writable(t)
	const text = "0123456789"
	d := string(digest.FromString(text))
	ways := map[string]func(repository string) answer{
		"POST": func(r string) answer { return f.do("POST", "/v2/"+r+"/blobs/uploads/?digest="+d, text) },
		"PUT":  func(r string) answer { return f.do("PUT", f.begin(r)+"?digest="+d, text) },
		"stream": func(r string) answer {
			path := f.begin(r)
			f.want(f.do("PATCH", path, text), 202, "")
			return f.do("PUT", path+"?digest="+d, "")
		},
		"chunks": func(r string) answer {
			path := f.begin(r)
			f.want(f.do("PATCH", path, text[:4], "Content-Range", "0-3"), 202, "")
			a := f.want(f.do("PATCH", path, text[:4], "Content-Range", "0-3"), 416, codeUploadInvalid)
			if a.header.Get("Range") != "0-3" || a.header.Get("Location") != path {
				t.Errorf("a chunk sent twice: %v", a.header)
			}
			f.want(f.do("PATCH", path, text[6:], "Content-Range", "6-9"), 416, codeUploadInvalid)
			f.want(f.do("PATCH", path, text[4:6], "Content-Range", "4-9"), 400, codeSizeInvalid)
			f.want(f.do("PATCH", path, text[4:], "Content-Range", "4-"), 416, codeUploadInvalid)
			a = f.want(f.do("GET", path, ""), 204, "")
			if a.header.Get("Range") != "0-3" || a.header.Get("Location") != path {
				t.Errorf("status: %v", a.header)
			}
			f.want(f.do("PATCH", path, text[4:7], "Content-Range", "4-6"), 202, "")
			return f.do("PUT", path+"?digest="+d, text[7:], "Content-Range", "7-9")
		},
	}
	for way, push := range ways {
		a := f.want(push("x/"+strings.ToLower(way)), 201, "")
		if a.header.Get("Docker-Content-Digest") != d || a.header.Get("Location") != "/v2/x/"+strings.ToLower(way)+"/blobs/"+d {
			t.Errorf("%s: %v", way, a.header)
		}
		f.ingests(0)
		if a := f.do("GET", a.header.Get("Location"), ""); a.body != text {
			t.Errorf("%s: %q is stored", way, a.body)
		}
		if err := f.Store.Delete(t.Context(), digest.Digest(d)); err != nil {
			t.Errorf("%s: %v", way, err)
		}
	}
}

func TestPushOfAnotherDigestLeavesNothing(t *testing.T) {
	t.Parallel()
	f := writable(t)
	other := string(digest.FromString("other"))
	f.want(f.do("POST", "/v2/x/blobs/uploads/?digest="+other, "text"), 400, codeDigestInvalid)
	path := f.begin("x")
	f.want(f.do("PATCH", path, "text"), 202, "")
	f.want(f.do("PUT", path+"?digest=sha256:1", ""), 400, codeDigestInvalid)
	f.want(f.do("PUT", path, ""), 400, codeDigestInvalid)
	f.want(f.do("PUT", path+"?digest="+other, ""), 400, codeDigestInvalid)
	f.want(f.do("GET", path, ""), 404, codeUploadUnknown)
	f.want(f.do("HEAD", "/v2/x/blobs/"+other, ""), 404, "")
	f.ingests(0)
}

func TestUploadOfAnotherRepository(t *testing.T) {
	t.Parallel()
	f := writable(t)
	path := f.begin("x")
	f.want(f.do("PATCH", strings.Replace(path, "/x/", "/y/", 1), "text"), 404, codeUploadUnknown)
	f.want(f.do("PATCH", path[:len(path)-1]+"g", "text"), 404, codeUploadUnknown)
	f.want(f.do("DELETE", path, ""), 204, "")
	f.want(f.do("DELETE", path, ""), 404, codeUploadUnknown)
	f.want(f.do("PATCH", path, "text"), 404, codeUploadUnknown)
	f.ingests(0)
}

func TestMount(t *testing.T) {
	t.Parallel()
	f := writable(t)
	d := f.blob("text")
	path, err := f.Store.Path(d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-48 * time.Hour)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	a := f.want(f.do("POST", "/v2/y/blobs/uploads/?from=x&mount="+string(d.Digest), ""), 201, "")
	if a.header.Get("Location") != "/v2/y/blobs/"+string(d.Digest) {
		t.Errorf("%v", a.header)
	}
	if fi, err := os.Stat(path); err != nil || !fi.ModTime().After(old) {
		t.Errorf("the blob is not freshened, and a sweep would delete it: %v", err)
	}
	f.want(f.do("POST", "/v2/y/blobs/uploads/?from=x&mount="+string(digest.FromString("other")), ""), 202, "")
}

// If a client disconnects, the bytes of its upload are kept, and the upload can continue.
func TestCutUploadGoesOn(t *testing.T) {
	t.Parallel()
	f := writable(t)
	text := strings.Repeat("0123456789", 1000)
	path := f.begin("x")
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "PATCH %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", path, len(text), text[:4000])
	_ = c.(*net.TCPConn).CloseWrite()
	_, _ = io.Copy(io.Discard, c) // until the server has closed the connection
	_ = c.Close()
	if a := f.want(f.do("GET", path, ""), 204, ""); a.header.Get("Range") != "0-3999" {
		t.Fatalf("Range %q", a.header.Get("Range"))
	}
	f.want(f.do("PATCH", path, text[4000:], "Content-Range", fmt.Sprintf("4000-%d", len(text)-1)), 202, "")
	f.want(f.do("PUT", path+"?digest="+string(digest.FromString(text)), ""), 201, "")
}

// late is a ResponseWriter whose first deadline has passed, as if the request's body had taken that long.
type late struct {
	http.ResponseWriter
	later bool
}

func (l *late) Unwrap() http.ResponseWriter { return l.ResponseWriter }

func (l *late) SetWriteDeadline(at time.Time) error {
	if !l.later {
		l.later, at = true, time.Now().Add(-time.Second)
	}
	return http.NewResponseController(l.ResponseWriter).SetWriteDeadline(at)
}

func TestReplyToALongUpload(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable = true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.ServeHTTP(&late{ResponseWriter: w}, r) }))
	defer server.Close()
	f := fixture{t, s, server.URL}
	f.want(f.do("POST", "/v2/x/blobs/uploads/?digest="+string(digest.FromString("text")), "text"), 201, "")
	f.want(f.do("POST", "/v2/x/blobs/uploads/?digest="+string(digest.FromString("other")), "text"), 400, codeDigestInvalid)
}

// A client that closes its side of the connection after the request gets the response, and leaves no upload.
func TestClientsThatEndTheirDirection(t *testing.T) {
	t.Parallel()
	f := writable(t)
	layer := f.blob("layer")
	f.blob("{}")
	m := manifest(t, nil, "", nil, layer)
	blob := strings.Repeat("0123456789", 1<<20)
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/v2/x/blobs/uploads/?digest=" + string(digest.FromString(blob)), blob},
		{"PUT", "/v2/x/manifests/1", m},
		{"PUT", f.begin("x") + "?digest=" + string(digest.FromString("")), ""},
	} {
		c1, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c1.Close()
		if _, err := fmt.Fprintf(c1, "%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", c.method, c.path, len(c.body), c.body); err != nil {
			t.Fatal(err)
		}
		if err := c1.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		reply, err := io.ReadAll(c1)
		if err != nil || !strings.HasPrefix(string(reply), "HTTP/1.1 201 ") {
			t.Errorf("%s %s: %q, %v", c.method, c.path, reply, err)
		}
	}
	f.ingests(0)
}

// If one request starts and ends an upload, the client does not know the upload's ID.
func TestCutUploadOfOneRequestLeavesNothing(t *testing.T) {
	t.Parallel()
	f := writable(t)
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "POST /v2/x/blobs/uploads/?digest=%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\ntext", digest.FromString("text"))
	_ = c.(*net.TCPConn).CloseWrite()
	if reply, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(reply), "HTTP/1.1 400 ") {
		t.Errorf("%q, %v", reply, err)
	}
	f.ingests(0)
}

// Clients that send large manifests slowly do not prevent the push of a small one.
func TestClientsThatSendManifestsSlowly(t *testing.T) {
	t.Parallel()
	f := writable(t)
	f.blob("{}")
	for range 2 * maxDocuments {
		c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "PUT /v2/x/manifests/1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", image.MaxDocument, strings.Repeat(" ", 2*small)); err != nil {
			t.Fatal(err)
		}
	}
	f.want(f.do("PUT", "/v2/x/manifests/1", manifest(t, nil, "", nil)), 201, "")
}

// A client that finds a manifest here does not send it. So a sweep keeps that manifest and its parts.
func TestHeadOfAManifestFreshensIt(t *testing.T) {
	t.Parallel()
	f := writable(t)
	d := f.image("layer", "x:1")
	old := time.Now().Add(-48 * time.Hour)
	var paths []string
	for _, dgst := range []digest.Digest{d.Digest, digest.FromString("layer"), digest.FromString("{}")} {
		path, err := f.Store.Path(dgst)
		if err == nil {
			err = os.Chtimes(path, old, old)
		}
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	f.want(f.do("HEAD", "/v2/x/manifests/"+string(d.Digest), ""), 200, "")
	for _, path := range paths {
		if fi, err := os.Stat(path); err != nil || !fi.ModTime().After(old) {
			t.Errorf("%s is not freshened, and a sweep would delete it: %v", path, err)
		}
	}
}

func TestPushManifest(t *testing.T) {
	t.Parallel()
	f := writable(t)
	layer := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromString("layer"), Size: 5}
	m := manifest(t, nil, "", nil, layer)
	put := func(object, text, contentType string) answer {
		return f.do("PUT", "/v2/x/y/manifests/"+object, text, "Content-Type", contentType)
	}
	a := f.want(put("1", m, v1.MediaTypeImageManifest), 404, codeManifestBlobUnknown)
	if !strings.Contains(a.body, v1.DescriptorEmptyJSON.Digest.String()) {
		t.Errorf("which blob is missing is not told: %s", a.body)
	}
	f.blob("{}")
	f.blob("layer")
	a = f.want(put("1", m, v1.MediaTypeImageManifest), 201, "")
	if d := string(digest.FromString(m)); a.header.Get("Location") != "/v2/x/y/manifests/"+d || a.header.Get("Docker-Content-Digest") != d {
		t.Errorf("%v", a.header)
	}
	if img, err := f.Names.Get("x/y:1"); err != nil || img.Target.Digest != digest.FromString(m) || img.Target.MediaType != v1.MediaTypeImageManifest {
		t.Errorf("%+v, %v", img, err)
	}
	f.want(put(string(digest.FromString(m)), m, v1.MediaTypeImageManifest), 201, "")
	f.want(put(string(digest.FromString("other")), m, v1.MediaTypeImageManifest), 400, codeDigestInvalid)
	f.want(put(digest.SHA512.FromString(m).String(), m, v1.MediaTypeImageManifest), 201, "")
	f.want(put("2", m, v1.MediaTypeImageIndex), 400, codeManifestInvalid)
	f.want(put("2", m, "text/html; x=\xff"), 400, codeManifestInvalid)
	f.want(put("2", "{}", v1.MediaTypeImageManifest), 400, codeManifestInvalid)
	f.want(put("2", "no JSON", v1.MediaTypeImageManifest), 400, codeManifestInvalid)
	f.want(put("2", strings.Replace(m, `"size":5`, `"size":6`, 1), v1.MediaTypeImageManifest), 404, codeManifestBlobUnknown)
	f.want(put("2", m+strings.Repeat(" ", 8<<20), v1.MediaTypeImageManifest), 413, codeManifestInvalid)
	f.want(put("..", m, v1.MediaTypeImageManifest), 400, codeManifestInvalid)
	f.want(f.do("GET", "/v2/x/y/manifests/2", ""), 404, codeManifestUnknown)

	index := func(d digest.Digest, size int) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[{"mediaType":%q,"digest":"%s","size":%d}]}`,
			v1.MediaTypeImageIndex, v1.MediaTypeImageManifest, d, size)
	}
	f.want(put("3", index(digest.FromString("elsewhere"), 9), v1.MediaTypeImageIndex), 404, codeManifestBlobUnknown)
	f.want(put("3", index(digest.FromString(m), len(m)), v1.MediaTypeImageIndex), 201, "")
	f.want(f.do("GET", "/v2/x/y/manifests/3?ns=docker.io", ""), 404, codeManifestUnknown)
	if a := f.do("GET", "/v2/x/y/tags/list", ""); a.body != `{"name":"x/y","tags":["1","3"]}` {
		t.Errorf("tags %s", a.body)
	}
}

// A tag in another tool's layout is moved, and does not get a second entry.
func TestPushOfABareTag(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable, s.Bare = true, "layout"
	f := start(t, s, 10)
	f.image("old", "v1")
	f.blob("new")
	m := manifest(t, nil, "", nil, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromString("new"), Size: 3})
	f.want(f.do("PUT", "/v2/layout/manifests/v1", m), 201, "")
	list, err := f.Names.List()
	if err != nil || len(list) != 1 || list[0].Name != "v1" || list[0].Target.Digest != digest.FromString(m) {
		t.Errorf("names %+v, %v", list, err)
	}
}

func TestUploadsAreBounded(t *testing.T) {
	t.Parallel()
	f := writable(t)
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			for i := w; i < maxUploads; i += 4 {
				u, err := f.Store.Writer(t.Context(), fmt.Sprintf("%sx/%d", uploadPrefix, i), 0, "")
				if err == nil {
					err = u.Close()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	a := f.want(f.do("POST", "/v2/x/blobs/uploads/", ""), 429, codeTooManyRequests)
	if a.header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	old := time.Now().Add(-2 * abandoned)
	if err := filepath.WalkDir(filepath.Join(f.Store.Root(), "ingest"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Name() == "data" {
			err = os.Chtimes(path, old, old)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	f.begin("x")
	f.ingests(1)
}

// A sweep that deletes everything it may keeps the objects that a push has found or sent, until the push has set the
// name.
func TestPushesOfTheSameBlobAtTheSameTime(t *testing.T) {
	t.Parallel()
	f := writable(t)
	text := strings.Repeat("x", 1<<20)
	d := string(digest.FromString(text))
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			a := f.do("POST", fmt.Sprintf("/v2/x%d/blobs/uploads/?digest=%s", i, d), text)
			f.want(a, 201, "")
		})
	}
	group.Wait()
	f.ingests(0)
}

// FuzzRequest sends requests of any form to a server that allows everything. Whatever the request, the response is a
// valid HTTP response, and no file is created outside the store.
func FuzzRequest(f *testing.F) {
	d := string(digest.FromString("{}"))
	for _, seed := range []struct{ method, path, header, value, body string }{
		{"GET", "/v2/", "", "", ""},
		{"GET", "/v2/x/manifests/1?ns=docker.io", "Range", "bytes=0-", ""},
		{"HEAD", "/v2/x/blobs/" + d, "If-Range", "x", ""},
		{"POST", "/v2/x/blobs/uploads/?digest=" + d, "", "", "{}"},
		{"POST", "/v2/x/blobs/uploads/?mount=" + d + "&from=y", "", "", ""},
		{"PATCH", "/v2/x/blobs/uploads/1", "Content-Range", "0-1", "{}"},
		{"PUT", "/v2/x/manifests/1", "Content-Type", v1.MediaTypeImageManifest, `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`},
		{"PUT", "/v2/x/manifests/../../x", "Content-Type", "a", "{"},
		{"DELETE", "/v2/x/manifests/1", "", "", ""},
		{"DELETE", "/v2/x/blobs/" + d, "", "", ""},
		{"GET", "/v2/x/tags/list?n=1&last=a", "Authorization", "Basic =", ""},
		{"GET", "/v2/_catalog?n=%zz", "", "", ""},
		{"GET", "/v2/x/referrers/" + d + "?artifactType=a", "", "", ""},
	} {
		f.Add(seed.method, seed.path, seed.header, seed.value, seed.body)
	}
	f.Fuzz(func(t *testing.T, method, path, header, value, body string) {
		s := newServer(t)
		s.Writable, s.Deletable = true, true
		r := httptest.NewRequest("GET", "/", strings.NewReader(body))
		r.Method = method
		var err error
		if r.URL, err = r.URL.Parse(path); err != nil {
			return
		}
		if header != "" {
			r.Header.Set(header, value)
		}
		w := httptest.NewRecorder()
		func() {
			defer func() {
				if p := recover(); p != nil && p != http.ErrAbortHandler {
					panic(p)
				}
			}()
			s.ServeHTTP(w, r)
		}()
		if w.Code < 200 || w.Code > 599 {
			t.Errorf("%s %s: status %d", method, path, w.Code)
		}
		parent := filepath.Dir(s.Store.Root())
		entries, err := os.ReadDir(parent)
		if err != nil || len(entries) != 1 {
			t.Errorf("%s %s: %v appeared beside the store, %v", method, path, entries, err)
		}
	})
}
