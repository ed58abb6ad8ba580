package serve

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/bcrypt"
)

// fixture is a server that has a store of its own.
type fixture struct {
	*testing.T
	*Server
	url string
}

func newServer(t *testing.T) *Server {
	t.Helper()
	store, err := content.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	names, err := image.OpenNames(store, "default")
	if err != nil {
		t.Fatal(err)
	}
	return &Server{Store: store, Names: names}
}

// start listens on a port until the test ends.
func start(t *testing.T, s *Server, connections int) fixture {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l, connections, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != context.Canceled {
			t.Errorf("serve ended with %v", err)
		}
	})
	return fixture{t, s, "http://" + l.Addr().String()}
}

func (f fixture) blob(b string) v1.Descriptor {
	f.Helper()
	d := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromString(b), Size: int64(len(b))}
	if _, err := content.WriteBlob(f.Context(), f.Store, "test", strings.NewReader(b), d.Size, d.Digest); err != nil {
		f.Fatal(err)
	}
	return d
}

// manifest returns the text of a manifest.
func manifest(t *testing.T, subject *v1.Descriptor, artifactType string, annotations map[string]string, layers ...v1.Descriptor) string {
	t.Helper()
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: v1.DescriptorEmptyJSON, Layers: layers, Subject: subject, ArtifactType: artifactType, Annotations: annotations}
	m.SchemaVersion = 2
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// image stores an image of one layer, and gives it names.
func (f fixture) image(layer string, names ...string) v1.Descriptor {
	f.Helper()
	f.blob("{}")
	d := f.blob(manifest(f.T, nil, "", nil, f.blob(layer)))
	d.MediaType = v1.MediaTypeImageManifest
	for _, name := range names {
		if _, err := f.Names.Create(f.Context(), name, d); err != nil {
			f.Fatal(err)
		}
	}
	return d
}

type answer struct {
	status int
	header http.Header
	body   string
}

// code returns the error code in the response.
func (a answer) code() string {
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal([]byte(a.body), &body) != nil || len(body.Errors) != 1 || body.Errors[0].Message == "" {
		return ""
	}
	return body.Errors[0].Code
}

// do sends a request. In headers, each name is followed by its value.
func (f fixture) do(method, path, body string, headers ...string) answer {
	f.Helper()
	r, err := http.NewRequest(method, f.url+path, strings.NewReader(body))
	if err != nil {
		f.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		f.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		f.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(b)}
}

func (f fixture) want(a answer, status int, code string) answer {
	f.Helper()
	if a.status != status || code != "" && a.code() != code {
		f.Errorf("status %d, body %q; want %d %s", a.status, a.body, status, code)
	}
	return a
}

func TestPull(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	d := f.image("0123456789", "x/y:1")
	layer := digest.FromString("0123456789")

	f.want(f.do("GET", "/v2/", ""), 200, "")
	for _, object := range []string{"1", string(d.Digest)} {
		a := f.want(f.do("GET", "/v2/x/y/manifests/"+object, ""), 200, "")
		if digest.FromString(a.body) != d.Digest || a.header.Get("Docker-Content-Digest") != string(d.Digest) || a.header.Get("Content-Type") != d.MediaType {
			t.Errorf("manifest %s: %+v", object, a)
		}
		h := f.want(f.do("HEAD", "/v2/x/y/manifests/"+object, ""), 200, "")
		if h.body != "" || h.header.Get("Content-Length") != fmt.Sprint(d.Size) || h.header.Get("Docker-Content-Digest") != string(d.Digest) {
			t.Errorf("HEAD of manifest %s: %+v", object, h)
		}
	}
	path := "/v2/x/y/blobs/" + string(layer)
	for _, c := range []struct {
		header, value string
		status        int
		body          string
	}{
		{"X", "", 200, "0123456789"},
		{"Range", "bytes=2-4", 206, "234"},
		{"Range", "bytes=7-", 206, "789"},
		{"Range", "bytes=-2", 206, "89"},
		{"Range", "bytes=0-100", 206, "0123456789"},
		{"Range", "bytes=0-1,3-4", 200, "0123456789"},
		{"If-None-Match", `"` + string(layer) + `"`, 304, ""},
		{"If-None-Match", `"other"`, 200, "0123456789"},
	} {
		if a := f.want(f.do("GET", path, "", c.header, c.value), c.status, ""); a.body != c.body {
			t.Errorf("%s: %s gives %q", c.header, c.value, a.body)
		}
	}
	for _, value := range []string{"bytes=10-", "bytes=5-2", "bytes=99999999999999999999-", "bytes=a-b"} {
		f.want(f.do("GET", path, "", "Range", value), 416, "")
	}
	if a := f.do("GET", path, "", "Range", "bytes=2-4", "If-Range", `"other"`); a.status != 200 || a.body != "0123456789" {
		t.Errorf("a range of another blob gives %+v", a)
	}
	f.want(f.do("GET", "/v2/x/y/manifests/2", ""), 404, codeManifestUnknown)
	f.want(f.do("GET", "/v2/x/y/manifests/"+string(layer), ""), 404, codeManifestUnknown)
	f.want(f.do("GET", "/v2/x/y/blobs/"+string(digest.FromString("other")), ""), 404, codeBlobUnknown)
}

// A repository and a tag together make a name. A mirror is asked for a host.
func TestWhichNameIsMeant(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Bare = "layout"
	f := start(t, s, 10)
	hub := f.image("hub", "docker.io/library/redis:7")
	own := f.image("own", "library/nginx:1")
	both := f.image("both", "docker.io/library/nginx:1", "other.example/a:1", "127.0.0.1:5000/p:1")
	bare := f.image("bare", "v1")
	for _, c := range []struct {
		path string
		want digest.Digest
	}{
		{"library/redis/manifests/7", hub.Digest},
		{"library/redis/manifests/7?ns=docker.io", hub.Digest},
		{"docker.io/library/redis/manifests/7", hub.Digest},
		{"library/redis/manifests/7?ns=other.example", ""},
		{"library/nginx/manifests/1", own.Digest},
		{"library/nginx/manifests/1?ns=docker.io", both.Digest},
		{"a/manifests/1?ns=other.example", both.Digest},
		{"a/manifests/1", ""},
		{"p/manifests/1?ns=127.0.0.1:5000", both.Digest},
		{"layout/manifests/v1", bare.Digest},
		{"other/manifests/v1", ""},
		{"layout/manifests/v1?ns=docker.io", ""},
	} {
		a := f.do("HEAD", "/v2/"+c.path, "")
		if got := digest.Digest(a.header.Get("Docker-Content-Digest")); got != c.want || (got == "") != (a.status == 404) {
			t.Errorf("%s: status %d, %s, not %s", c.path, a.status, got, c.want)
		}
	}
	if a := f.do("GET", "/v2/_catalog", ""); a.body != `{"repositories":["docker.io/library/nginx","docker.io/library/redis","layout","library/nginx","other.example/a"]}` {
		t.Errorf("catalog %s", a.body)
	}
}

func TestListsGoOnWhereTheyEnd(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	f.image("x", "x:c", "x:a", "x:b", "x:B", "y:1")
	var all []string
	for path := "/v2/x/tags/list?n=3"; path != ""; {
		a := f.want(f.do("GET", path, ""), 200, "")
		var list struct{ Tags []string }
		if err := json.Unmarshal([]byte(a.body), &list); err != nil || len(list.Tags) > 3 {
			t.Fatalf("%s: %v", a.body, err)
		}
		all = append(all, list.Tags...)
		path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
	}
	if !slices.Equal(all, []string{"B", "a", "b", "c"}) {
		t.Errorf("tags %q", all)
	}
	for path, want := range map[string]string{
		"/v2/x/tags/list":               `{"name":"x","tags":["B","a","b","c"]}`,
		"/v2/x/tags/list?n=0":           `{"name":"x","tags":[]}`,
		"/v2/x/tags/list?last=aa":       `{"name":"x","tags":["b","c"]}`,
		"/v2/x/tags/list?last=zz":       `{"name":"x","tags":[]}`,
		"/v2/_catalog?n=1":              `{"repositories":["x"]}`,
		"/v2/_catalog?n=1&last=x":       `{"repositories":["y"]}`,
		"/v2/_catalog?n=99999&last=yyy": `{"repositories":[]}`,
	} {
		if a := f.do("GET", path, ""); a.body != want {
			t.Errorf("%s: %s, not %s", path, a.body, want)
		}
	}
	f.want(f.do("GET", "/v2/x/tags/list?n=-1", ""), 400, codePageInvalid)
	f.want(f.do("GET", "/v2/z/tags/list", ""), 404, codeNameUnknown)
	f.image("new", "z:1")
	f.want(f.do("GET", "/v2/z/tags/list", ""), 200, "")
}

func TestReferrers(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable = true
	f := start(t, s, 10)
	subject := f.image("x", "x:1")
	if a := f.want(f.do("GET", "/v2/x/referrers/"+string(subject.Digest), ""), 200, ""); !strings.Contains(a.body, `"manifests":[]`) {
		t.Errorf("without referrers: %s", a.body)
	}
	for _, kind := range []string{"a/sbom", "a/signature"} {
		m := manifest(t, &subject, kind, map[string]string{"of": kind})
		a := f.want(f.do("PUT", "/v2/x/manifests/"+string(digest.FromString(m)), m, "Content-Type", v1.MediaTypeImageManifest), 201, "")
		if a.header.Get("OCI-Subject") != string(subject.Digest) {
			t.Errorf("OCI-Subject %q", a.header.Get("OCI-Subject"))
		}
	}
	for _, c := range []struct {
		query   string
		kinds   []string
		applied string
	}{{"", []string{"a/sbom", "a/signature"}, ""}, {"?artifactType=a/sbom", []string{"a/sbom"}, "artifactType"}, {"?artifactType=b", nil, "artifactType"}} {
		a := f.want(f.do("GET", "/v2/x/referrers/"+string(subject.Digest)+c.query, ""), 200, "")
		var list v1.Index
		if err := json.Unmarshal([]byte(a.body), &list); err != nil {
			t.Fatal(err)
		}
		var kinds []string
		for _, d := range list.Manifests {
			if d.Annotations["of"] != d.ArtifactType || d.MediaType != v1.MediaTypeImageManifest || d.Size == 0 {
				t.Errorf("referrer %+v", d)
			}
			kinds = append(kinds, d.ArtifactType)
		}
		slices.Sort(kinds)
		if !slices.Equal(kinds, c.kinds) || a.header.Get("OCI-Filters-Applied") != c.applied || a.header.Get("Content-Type") != v1.MediaTypeImageIndex {
			t.Errorf("%s: %q, %v", c.query, kinds, a.header)
		}
	}
}

// A list of referrers that is too large for one response continues in the next, and has each referrer once.
func TestReferrersInSeveralReplies(t *testing.T) {
	t.Parallel()
	f := writable(t)
	subject := f.image("x", "x:1")
	for i := range 5 {
		m := manifest(t, &subject, "a/sbom", map[string]string{"a": strings.Repeat(fmt.Sprint(i), maxReferrers/3)})
		f.want(f.do("PUT", "/v2/x/manifests/"+string(digest.FromString(m)), m), 201, "")
	}
	seen, replies := map[digest.Digest]bool{}, 0
	for path := "/v2/x/referrers/" + string(subject.Digest) + "?artifactType=a/sbom"; path != ""; replies++ {
		a := f.want(f.do("GET", path, ""), 200, "")
		var list v1.Index
		if err := json.Unmarshal([]byte(a.body), &list); err != nil || len(list.Manifests) == 0 || len(a.body) > maxReferrers+4096 {
			t.Fatalf("%d bytes with %d referrers, %v", len(a.body), len(list.Manifests), err)
		}
		for _, d := range list.Manifests {
			if seen[d.Digest] {
				t.Errorf("%s is listed twice", d.Digest)
			}
			seen[d.Digest] = true
		}
		path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), ">")
	}
	if len(seen) != 5 || replies != 3 {
		t.Errorf("%d referrers in %d replies", len(seen), replies)
	}
}

// A path that the protocol does not have gets an error of the protocol, and never a file.
func TestPathsThatMeanNothing(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	f.image("x", "x:1")
	long := strings.Repeat("a", 300)
	for path, want := range map[string]struct {
		status int
		code   string
	}{
		"/":                                      {404, codeNameUnknown},
		"/v1/":                                   {404, codeNameUnknown},
		"/v2/x":                                  {404, codeNameUnknown},
		"/v2/x/blobs":                            {404, codeNameUnknown},
		"/v2//manifests/1":                       {400, codeNameInvalid},
		"/v2/x/other/1":                          {404, codeNameUnknown},
		"/v2/X/manifests/1":                      {400, codeNameInvalid},
		"/v2/" + long + "/manifests/1":           {400, codeNameInvalid},
		"/v2/x/manifests/" + long:                {400, codeManifestInvalid},
		"/v2/x/manifests/.a":                     {400, codeManifestInvalid},
		"/v2/x/manifests/%00":                    {400, codeManifestInvalid},
		"/v2/x/manifests/sha256:12":              {400, codeDigestInvalid},
		"/v2/x/blobs/sha256:..%2f..%2f":          {404, ""},
		"/v2/x/blobs/md5:" + long[:32]:           {400, codeDigestInvalid},
		"/v2/x/blobs/..":                         {400, codeDigestInvalid},
		"/v2/..%2f..%2fetc/manifests/passwd":     {400, codeNameInvalid},
		"/v2/../../../../etc/passwd":             {404, codeNameUnknown},
		"/v2/x/blobs/uploads/" + long:            {404, codeUploadUnknown},
		"/v2/x/blobs/uploads/":                   {404, codeUploadUnknown},
		"/v2/x/manifests/1?ns=../../..":          {404, codeManifestUnknown},
		"/v2/x/manifests/1?ns=%00%0a":            {404, codeManifestUnknown},
		"/v2/x/referrers/1":                      {400, codeDigestInvalid},
		"/v2/x/tags/other":                       {404, codeNameUnknown},
		"/v2/x/tags/list?n=99999999999999999999": {400, codePageInvalid},
	} {
		f.want(f.do("GET", path, ""), want.status, want.code)
	}
	f.want(f.do("GET", "/v2/x/manifests/1", "", "Origin", "http://evil.example"), 403, codeDenied)
	f.want(f.do("GET", "/v2/x/manifests/1", "", "Sec-Fetch-Site", "cross-site"), 403, codeDenied)
}

func TestReadOnlyRefusesToWrite(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	d := f.image("x", "x:1")
	for _, c := range [][2]string{
		{"POST", "/v2/x/blobs/uploads/"}, {"POST", "/v2/x/blobs/uploads/?mount=" + string(d.Digest)}, {"PUT", "/v2/x/manifests/1"},
		{"PATCH", "/v2/x/blobs/uploads/1"}, {"DELETE", "/v2/x/manifests/1"}, {"DELETE", "/v2/x/blobs/" + string(d.Digest)},
		{"DELETE", "/v2/x/blobs/uploads/1"}, {"OPTIONS", "/v2/"}, {"X\tY", "/v2/"}, {"PROPFIND", "/v2/x/tags/list"},
	} {
		if strings.Contains(c[0], "\t") {
			continue
		}
		a := f.want(f.do(c[0], c[1], "{}"), 405, codeUnsupported)
		if a.header.Get("Allow") == "" {
			t.Errorf("%q: no Allow", c)
		}
	}
	f.want(f.do("GET", "/v2/x/manifests/1", ""), 200, "")
	if list, err := f.Store.ListStatuses(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("ingests %v, %v", list, err)
	}
}

// A file that is being sent stays readable after its blob was deleted.
func TestDeletedWhileItIsSent(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	text := strings.Repeat("0123456789abcdef", 1<<20)
	d := f.blob(text)
	resp, err := http.Get(f.url + "/v2/x/blobs/" + string(d.Digest))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	first := make([]byte, 100)
	if _, err := io.ReadFull(resp.Body, first); err != nil {
		t.Fatal(err)
	}
	if err := f.Store.Delete(t.Context(), d.Digest); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(resp.Body)
	if err != nil || digest.FromBytes(append(first, rest...)) != d.Digest {
		t.Errorf("%d bytes came: %v", len(first)+len(rest), err)
	}
	f.want(f.do("GET", "/v2/x/blobs/"+string(d.Digest), ""), 404, codeBlobUnknown)
}

func TestCorruptManifestIsNotSent(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	d := f.image("x", "x:1")
	path, err := f.Store.Path(d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	damage(t, path)
	if a := f.do("GET", "/v2/x/manifests/1", ""); a.status != 500 || strings.Contains(a.body, path) {
		t.Errorf("%+v", a)
	}
}

// Idle connections are closed in favour of new ones, and busy ones are not.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	const most = 4
	f := start(t, newServer(t), most)
	var idle []net.Conn
	for range 3 * most {
		c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 512)
		if n, err := c.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("HTTP/1.1 200")) {
			t.Fatalf("connection %d: %q, %v", len(idle), b[:n], err)
		}
		idle = append(idle, c)
	}
	closed := make(chan error, len(idle))
	for _, c := range idle {
		go func() {
			_, err := c.Read(make([]byte, 1))
			closed <- err
		}()
	}
	for range 2 * most {
		select {
		case err := <-closed:
			if err != io.EOF {
				t.Error(err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("more than %d connections are open", most)
		}
	}
}

// A connection that pauses between requests, or within one, continues where it was. It is closed when the server ends.
func TestRestingConnections(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	const request = "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
	var resting sync.WaitGroup
	for _, pieces := range [][]string{
		{request, request, request},
		{request[:2], request[2:], request[:1], request[1:20], request[20:]},
		{request + request, request + request[:3], request[3:]},
		{request + request[:19], request[19:]}, // a complete line first
	} {
		resting.Go(func() {
			c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			replies := bufio.NewReader(c)
			sent := ""
			for _, piece := range pieces {
				if _, err := io.WriteString(c, piece); err != nil {
					t.Error(err)
					return
				}
				for sent += piece; len(sent) >= len(request); sent = sent[len(request):] {
					resp, err := http.ReadResponse(replies, nil)
					if err != nil || resp.StatusCode != http.StatusOK {
						t.Errorf("%v, %v", resp, err)
						return
					}
					if _, err := io.Copy(io.Discard, resp.Body); err != nil {
						t.Error(err)
						return
					}
				}
				time.Sleep(3 * parkAfter)
			}
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				t.Error(err)
			}
			if _, err := replies.ReadByte(); err != io.EOF {
				t.Errorf("after the client's end: %v", err)
			}
		})
	}
	resting.Wait()
}

// A body that comes late is not read as a request, even if the header before it came together with another request.
func TestBodyIsNoRequest(t *testing.T) {
	t.Parallel()
	f := writable(t)
	const request = "GET /v2/_catalog HTTP/1.1\r\nHost: localhost\r\n\r\n"
	for _, header := range []string{
		fmt.Sprintf("Content-Length: %d\r\n\r\n", len(request)),
		fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n", len(request)),
	} {
		c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		end := "" // the end of the body
		if strings.HasPrefix(header, "T") {
			end = "\r\n0\r\n\r\n"
		}
		for _, piece := range []string{request + "POST /v2/x/blobs/uploads/?digest=" + string(digest.FromString(request)) + " HTTP/1.1\r\nHost: localhost\r\n" + header, request + end} {
			if _, err := io.WriteString(c, piece); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * parkAfter)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		replies, err := io.ReadAll(c)
		if err != nil || strings.Count(string(replies), "HTTP/1.1 ") != 2 || !strings.Contains(string(replies), "HTTP/1.1 201") {
			t.Errorf("%q: %q, %v", header, replies, err)
		}
	}
}

func TestHeaderBomb(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() {
		_, _ = io.WriteString(c, "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n")
		for i := range 100000 {
			if _, err := fmt.Fprintf(c, "X-%d: %d\r\n", i, i); err != nil {
				return
			}
		}
	}()
	b := make([]byte, 512)
	if n, err := c.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("HTTP/1.1 431")) {
		t.Errorf("%q, %v", b[:n], err)
	}
}

func TestUsers(t *testing.T) {
	t.Parallel()
	hash, err := bcrypt.GenerateFromPassword([]byte("word"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t)
	if s.Users, err = ReadUsers(strings.NewReader("# users\nme:" + string(hash) + "\n\n")); err != nil {
		t.Fatal(err)
	}
	f := start(t, s, 10)
	a := f.want(f.do("GET", "/v2/", ""), 401, codeUnauthorized)
	if a.header.Get("WWW-Authenticate") == "" {
		t.Error("no WWW-Authenticate")
	}
	for _, c := range []struct {
		user, password string
		status         int
	}{{"me", "word", 200}, {"me", "word", 200}, {"me", "wor", 401}, {"you", "word", 401}, {"", "", 401}, {"you", "no password", 401}, {"me", strings.Repeat("word", 50), 401}} {
		r := httptest.NewRequest("GET", "/v2/", nil)
		r.SetBasicAuth(c.user, c.password)
		f.want(f.do("GET", "/v2/", "", "Authorization", r.Header.Get("Authorization")), c.status, "")
	}
	for _, file := range []string{"", "me", "me:{SHA}abc", "me:word", ":" + string(hash)} {
		if _, err := ReadUsers(strings.NewReader(file)); err == nil {
			t.Errorf("%q is taken for a file of users", file)
		}
	}
}

func TestOneConnection(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	client, server := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(t.Context(), Single(server), 1, nil) }()
	b := make([]byte, 512)
	for range 2 {
		if _, err := io.WriteString(client, "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if n, err := client.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("HTTP/1.1 200")) {
			t.Fatalf("%q, %v", b[:n], err)
		}
	}
	_ = client.Close()
	if err := <-ended; err != nil {
		t.Errorf("serve ended with %v", err)
	}
}

// Clients that request manifests and don't read the responses do not keep others from getting one.
func TestClientsThatReadNothing(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 4*maxDocuments)
	f.image("x", "x:1")
	large := f.blob(manifest(t, nil, "", map[string]string{"a": strings.Repeat("x", image.MaxDocument-1000)}))
	for range 2 * maxDocuments {
		c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.(*net.TCPConn).SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintf(c, "GET /v2/x/manifests/%s HTTP/1.1\r\nHost: localhost\r\n\r\n", large.Digest); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
	}
	f.want(f.do("GET", "/v2/x/manifests/1", ""), 200, "")
}

// On a loopback address, a web page whose name leads there (DNS rebinding) gets no response.
func TestHostsOnLoopback(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	for host, status := range map[string]int{"localhost:5000": 200, "127.0.0.1": 200, "[::1]:80": 200, "attacker.example": 403, "localhost.attacker.example:5000": 403, "": 403} {
		c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "GET /v2/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), fmt.Sprintf("HTTP/1.1 %d ", status)) {
			t.Errorf("Host %q: %q, %v", host, b, err)
		}
	}
}

// A request for something that a store can't have is the client's error.
func TestMistakesOfClients(t *testing.T) {
	t.Parallel()
	f := writable(t)
	f.blob("{}")
	layer := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.SHA384.FromString("layer"), Size: 5}
	f.want(f.do("PUT", "/v2/x/manifests/1", manifest(t, nil, "", nil, layer)), 400, "")
	m := manifest(t, nil, "", nil)
	f.want(f.do("PUT", "/v2/x/manifests/1?ns=a%20b", m), 400, "")
	f.want(f.do("PUT", "/v2/sha256/manifests/"+digest.FromString("x").Encoded(), m), 400, "")
	f.want(f.do("PUT", "/v2/x/manifests/1", m), 201, "")
}

// Failures of the store are logged, and the client does not see them.
func TestFailuresOfTheStoreAreLogged(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	logged := make(chan Request, 10)
	s.Log = func(r Request) { logged <- r }
	f := start(t, s, 10)
	f.image("x", "x:1")
	f.want(f.do("GET", "/v2/x/manifests/2", ""), 404, codeManifestUnknown)
	if r := <-logged; r.Err != nil || r.Status != 404 {
		t.Errorf("a client's mistake: %+v", r)
	}
	if err := os.WriteFile(filepath.Join(s.Store.Root(), v1.ImageIndexFile), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := f.want(f.do("GET", "/v2/x/manifests/1", ""), 500, codeUnknown)
	if r := <-logged; r.Err == nil || r.Status != 500 || strings.Contains(a.body, s.Store.Root()) {
		t.Errorf("%+v, reply %s", r, a.body)
	}
}

// Names with a digest make a repository known, but they are not tags, because nobody could pull them.
func TestNameWithADigestIsNoTag(t *testing.T) {
	t.Parallel()
	f := start(t, newServer(t), 10)
	d := f.image("x")
	if _, err := f.Names.Create(t.Context(), "x/y:1@"+string(d.Digest), d); err != nil {
		t.Fatal(err)
	}
	if a := f.do("GET", "/v2/x/y/tags/list", ""); a.status != 200 || strings.Contains(a.body, `"1"`) {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// A signature that was pushed under its tag can be found by that tag in each repository, although it has no name.
func TestServeSignaturesByTag(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.Writable, s.Deletable = true, true
	f := start(t, s, 16)
	subject, signature := f.image("a", "a:1"), f.image("b", "b:1")
	tag := layout.ReferrerTags(subject.Digest, "")[0].Tag
	f.want(f.do("GET", "/v2/x/manifests/"+tag, ""), 404, codeManifestUnknown)
	if err := f.Names.AddReferrers(t.Context(), []layout.Referrer{{Descriptor: signature, Subject: subject.Digest, Tag: tag}}); err != nil {
		t.Fatal(err)
	}
	if a := f.want(f.do("GET", "/v2/x/manifests/"+tag, ""), 200, ""); a.header.Get("Docker-Content-Digest") != string(signature.Digest) {
		t.Errorf("%v", a.header)
	}
	f.want(f.do("GET", "/v2/x/manifests/"+layout.ReferrerTags(subject.Digest, "")[1].Tag, ""), 404, codeManifestUnknown)
	f.want(f.do("DELETE", "/v2/x/manifests/"+tag, ""), 202, "")
	f.want(f.do("GET", "/v2/y/manifests/"+tag, ""), 404, codeManifestUnknown)
	f.want(f.do("DELETE", "/v2/x/manifests/"+tag, ""), 404, codeManifestUnknown)
	f.want(f.do("GET", "/v2/b/manifests/1", ""), 200, "")
}
