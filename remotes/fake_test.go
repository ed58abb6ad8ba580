package remotes

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	ondisk "distkit/disk/layout"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var realPlaces = sharedPlaces

// The tests don't use credentials and host configuration of the machine.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "dist-remote-test":
		os.Exit(helperMain(os.Args[1:]))
	case "proxy-test":
		os.Exit(proxyMain(os.Args[1], os.Args[2]))
	}
	for _, name := range []string{"REGISTRY_AUTH_FILE", "DOCKER_AUTH_CONFIG", "XDG_RUNTIME_DIR", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} {
		os.Unsetenv(name)
	}
	os.Setenv("DOCKER_CONFIG", "/nonexistent")
	os.Setenv("XDG_CONFIG_HOME", "/nonexistent")
	systemRun = "/nonexistent"
	sharedPlaces = func() []string { // only directories below one that belongs to the test
		runtime := os.Getenv("XDG_RUNTIME_DIR")
		return slices.DeleteFunc(realPlaces(), func(dir string) bool { return runtime == "" || !strings.HasPrefix(dir, runtime+"/") })
	}
	os.Exit(m.Run())
}

// fake is a registry with one repository, x. A test can replace its replies.
type fake struct {
	*httptest.Server
	mu        sync.Mutex
	blobs     map[digest.Digest][]byte
	manifests map[string]entry // by tag and by digest
	uploads   map[string][]byte
	tags      []string // listed in pages of two, as tags and as repositories; nil: there is no such list
	begun     int      // the number of uploads; each has its own ID
	referrers bool     // the registry supports lists of referrers
	limits    bool     // replies state limits, as Docker Hub's do
	requests  []*http.Request
	// fault is called first. If it returns true, it has replied in place of the registry.
	fault func(w http.ResponseWriter, r *http.Request, n int) bool
}

type entry struct {
	mediaType string
	content   []byte
}

func newFake(t *testing.T) *fake {
	f := unstarted()
	f.Start()
	t.Cleanup(f.Close)
	return f
}

func newTLSFake(t *testing.T) *fake {
	f := unstarted()
	f.StartTLS()
	t.Cleanup(f.Close)
	return f
}

func unstarted() *fake {
	f := &fake{blobs: map[digest.Digest][]byte{}, manifests: map[string]entry{}, uploads: map[string][]byte{}}
	f.Server = httptest.NewUnstartedServer(f)
	f.Config.ErrorLog = quiet
	return f
}

func (f *fake) host() string { return f.Listener.Addr().String() }

// authFile writes an auth file with user:password for the registry.
func (f *fake) authFile(t *testing.T, login string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "auth.json")
	if err := os.WriteFile(name, []byte(`{"auths":{"`+f.host()+`":{"auth":"`+basic(login)+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func (f *fake) blob(content []byte) string {
	d := digest.FromBytes(content)
	f.blobs[d] = content
	return d.String()
}

func (f *fake) manifest(tag, mediaType string, content []byte) ocispec.Descriptor {
	d := digest.FromBytes(content)
	f.manifests[d.String()] = entry{mediaType, content}
	if tag != "" {
		f.manifests[tag] = entry{mediaType, content}
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(content))}
}

// seen returns the requests, each as METHOD /path.
func (f *fake) seen() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []string
	for _, r := range f.requests {
		list = append(list, r.Method+" "+r.URL.Path)
	}
	return list
}

// reply sets a function that replies in place of the registry, and forgets the requests so far.
func (f *fake) reply(fault func(w http.ResponseWriter, r *http.Request, n int) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault, f.requests = fault, nil
}

// reset forgets the requests so far.
func (f *fake) reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = nil
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.requests)
}

// request returns the request number i, which counts from the end if it is negative.
func (f *fake) request(i int) *http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i < 0 {
		i += len(f.requests)
	}
	return f.requests[i]
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.requests = append(f.requests, r)
	n, fault := len(f.requests), f.fault
	f.mu.Unlock()
	if fault != nil && fault(w, r, n) {
		return
	}
	f.serve(w, r)
}

func (f *fake) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if id, ok := strings.CutPrefix(r.URL.Path, "/v2/x/manifests/"); ok && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		f.mu.Lock()
		m, ok := f.manifests[id]
		f.mu.Unlock()
		if ok {
			w.Header().Set("Content-Type", m.mediaType)
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(m.content).String())
			w.Header().Set("Content-Length", strconv.Itoa(len(m.content)))
			if f.limits {
				w.Header().Set("RateLimit-Limit", "100;w=21600")
				w.Header().Set("RateLimit-Remaining", "76;w=21600")
			}
			if r.Method != http.MethodHead {
				w.Write(m.content)
			}
			return
		}
	}
	if r.URL.Path == "/token" {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"token":%q,"access_token":%[1]q,"expires_in":300}`, oddSecret)
		return
	}
	if kind, ok := map[string]string{"/v2/x/tags/list": "tags", "/v2/_catalog": "repositories"}[r.URL.Path]; ok && f.tags != nil {
		list, rest := f.tags, []string(nil)
		if last := r.URL.Query().Get("last"); last != "" {
			list = list[slices.Index(list, last)+1:]
		}
		if list, rest = list[:min(2, len(list))], list[min(2, len(list)):]; len(rest) > 0 {
			w.Header().Set("Link", "<"+r.URL.Path+"?n=2&last="+list[len(list)-1]+`>; rel="next"`)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"name": "x", kind: list})
		return
	}
	if id, ok := strings.CutPrefix(r.URL.Path, "/v2/x/blobs/"); ok {
		f.mu.Lock()
		b, ok := f.blobs[digest.Digest(id)]
		f.mu.Unlock()
		if ok {
			w.Header().Set("Content-Type", "application/octet-stream")
			http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(b)))
			return
		}
	}
	if subject, ok := strings.CutPrefix(r.URL.Path, "/v2/x/referrers/"); ok && f.referrers {
		f.list(w, subject)
		return
	}
	if f.store(w, r) {
		return
	}
	w.WriteHeader(http.StatusNotFound)
	fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"not known"}]}`)
}

// list replies with the manifests that have a subject.
func (f *fake) list(w http.ResponseWriter, subject string) {
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}
	f.mu.Lock()
	for id, m := range f.manifests {
		var head referrer
		if json.Unmarshal(m.content, &head) == nil && head.Subject != nil && head.Subject.Digest.String() == subject && strings.Contains(id, ":") {
			d := ocispec.Descriptor{MediaType: m.mediaType, Digest: digest.Digest(id), Size: int64(len(m.content))}
			d.ArtifactType, d.Annotations = ondisk.DescribeReferrer(m.content)
			index.Manifests = append(index.Manifests, d)
		}
	}
	f.mu.Unlock()
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	_ = json.NewEncoder(w).Encode(index)
}

// store accepts manifests and uploads, and deletes manifests. If a request was interrupted, the bytes that were
// received are kept.
func (f *fake) store(w http.ResponseWriter, r *http.Request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	body, rerr := []byte(nil), error(nil)
	if r.Method == http.MethodPut || r.Method == http.MethodPatch {
		f.mu.Unlock()
		body, rerr = io.ReadAll(r.Body)
		f.mu.Lock()
	}
	if id, ok := strings.CutPrefix(r.URL.Path, "/v2/x/manifests/"); ok && r.Method == http.MethodPut {
		d := digest.FromBytes(body)
		f.manifests[id] = entry{r.Header.Get("Content-Type"), body}
		f.manifests[d.String()] = f.manifests[id]
		w.Header().Set("Docker-Content-Digest", d.String())
		if f.referrers {
			w.Header().Set("OCI-Subject", "yes")
		}
		w.WriteHeader(http.StatusCreated)
		return true
	}
	if id, ok := strings.CutPrefix(r.URL.Path, "/v2/x/manifests/"); ok && r.Method == http.MethodDelete && f.manifests[id].content != nil {
		delete(f.manifests, id)
		w.WriteHeader(http.StatusAccepted)
		return true
	}
	id, ok := strings.CutPrefix(r.URL.Path, "/v2/x/blobs/uploads/")
	if !ok {
		return false
	}
	if r.Method == http.MethodPost {
		if from := r.URL.Query().Get("from"); from == "other" {
			w.WriteHeader(http.StatusCreated)
			f.blobs[digest.Digest(r.URL.Query().Get("mount"))] = []byte("mounted")
			return true
		}
		f.begun++
		id = strconv.Itoa(f.begun)
		f.uploads[id] = nil
	}
	data, ok := f.uploads[id]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}`)
		return true
	}
	w.Header().Set("Location", "/v2/x/blobs/uploads/"+id+"?state=secret")
	if s := r.Header.Get("Content-Range"); s != "" && !strings.HasPrefix(s, strconv.Itoa(len(data))+"-") {
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return true
	}
	data = append(data, body...)
	f.uploads[id] = data
	if rerr != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	}
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(len(data)-1, 0)))
	switch r.Method {
	case http.MethodGet:
		w.WriteHeader(http.StatusNoContent)
	case http.MethodDelete:
		delete(f.uploads, id)
		w.WriteHeader(http.StatusNoContent)
	case http.MethodPut:
		d := digest.Digest(r.URL.Query().Get("digest"))
		if digest.FromBytes(data) != d {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"errors":[{"code":"DIGEST_INVALID"}]}`)
			return true
		}
		f.blobs[d] = data
		delete(f.uploads, id)
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusAccepted)
	}
	return true
}

// cut sends the full header, and the body up to n bytes.
func cut(w http.ResponseWriter, content []byte, n int) {
	w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	w.Write(content[:n])
	w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

// open opens repository x at the host. Pauses between attempts are made very short.
func open(t *testing.T, host string, o Options) *Registry {
	t.Helper()
	if o.HostsDir == "" {
		o.HostsDir = t.TempDir()
	}
	r, err := Open(host+"/x", o)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.(*Registry).clients {
		c.pause = time.Millisecond
		transport := c.http.Client.Transport.(roundTripper).RoundTripper.(*http.Transport)
		t.Cleanup(transport.CloseIdleConnections)
	}
	return r.(*Registry)
}

func fetch(t *testing.T, f Fetcher, id string, hints ...string) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	body, err := f.Fetch(ctx, id, hints...)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

// noise returns bytes that are the same in each run.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte("noise"))).Read(b)
	return b
}

func is(t *testing.T, err error, class func(error) bool) {
	t.Helper()
	if err == nil || !class(err) {
		t.Fatalf("wrong class of error: %v", err)
	}
	if s := err.Error(); strings.ContainsAny(s, "\n\r\x1b") || len(s) > 1000 {
		t.Fatalf("not one clear line: %q", s)
	}
}
