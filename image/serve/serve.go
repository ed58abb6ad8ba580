// Package serve implements the OCI distribution protocol (distribution-spec v1.1) as a server over a content store.
//
// A repository and a tag are a name of the store, REPOSITORY:TAG, in one namespace. Blobs are shared by all
// repositories, as they are in the store: anyone who knows a digest can read the blob. Uploads are ingests of the
// store: another process can resume them, and a sweep removes abandoned ones.
//
// [Server] is an http.Handler. [Server.Serve] runs it on a listener with a bounded number of connections. A request is
// parsed into a target and dispatched: reads to pull.go, writes to push.go and delete.go. Errors become replies in one
// place, reply.fail.
//
// Clients are untrusted. Nothing that they send becomes a path: repositories and tags are looked up among the names,
// and digests are checked by package content. Sizes, times and concurrency are bounded.
package serve

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"distkit/content"
	"distkit/image"
	"distkit/refname"

	"github.com/opencontainers/go-digest"
)

// Server serves requests. Its fields must be set before the first request.
type Server struct {
	Store *content.Store
	Names *image.Names
	// Bare is the repository of names that are only a tag, as other tools write them into layouts; "" means none.
	Bare string
	// Writable allows pushes, and Deletable deletes.
	Writable, Deletable bool
	// Users are the users with access; nil means everybody.
	Users *Users
	// Log, if set, is called after each request.
	Log func(Request)

	names cache
	// documents bounds the manifests that are decoded concurrently, and arriving the large ones that are received.
	documents, arriving slots
	uploads             uploads
	// hold keeps pushes of manifests and sweeps of this process apart: a sweep doesn't wait for a hold of its own
	// process.
	hold sync.RWMutex
}

// Request is a served request.
type Request struct {
	From, Method, Path string
	Status             int
	Bytes              int64 // of the reply's body
	Took               time.Duration
	Err                error // of the store, hidden from the client; nil for errors of the client
}

const (
	// maxDocuments is the number of manifests that are decoded concurrently, and of large ones that are received. Each
	// has at most 8 MiB, and decoding takes more memory.
	maxDocuments = 8
	// small is the size in bytes up to which any connection may receive a manifest.
	small = 32 << 10
)

// slots bounds a number of concurrent actions.
type slots struct {
	once sync.Once
	free chan struct{}
}

// take waits for a slot. It takes a free one even if ctx is done, because a client that has closed its sending
// direction waits for the reply. The caller must call release once.
func (s *slots) take(ctx context.Context, n int) (release func(), err error) {
	s.once.Do(func() { s.free = make(chan struct{}, n) })
	release = func() { <-s.free }
	select {
	case s.free <- struct{}{}:
		return release, nil
	default:
	}
	select {
	case s.free <- struct{}{}:
		return release, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(hw http.ResponseWriter, r *http.Request) {
	w := newReply(hw, r)
	begun := time.Now()
	err := s.answer(w, r)
	if s.Log != nil {
		// fail panics if the reply has begun.
		defer func() {
			if errors.As(err, new(*refusal)) {
				err = nil
			}
			s.Log(Request{r.RemoteAddr, r.Method, r.URL.RequestURI(), w.status, w.bytes, time.Since(begun), err})
		}()
	}
	if err != nil {
		w.fail(err)
	}
}

func (s *Server) answer(w *reply, r *http.Request) error {
	// A browser sends the origin of the page. No client of a registry is a web page of another site.
	if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" {
		return refuse(http.StatusForbidden, codeDenied, "requests from web pages are refused")
	}
	if !trustedHost(r) {
		return refuse(http.StatusForbidden, codeDenied, "on a loopback address, Host must be an address or localhost")
	}
	if s.Users != nil {
		if ok, err := s.Users.allow(r); err != nil {
			return err
		} else if !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="dist-serve", charset="UTF-8"`)
			return refuse(http.StatusUnauthorized, codeUnauthorized, "authentication required")
		}
	}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	t, err := parsePath(r.URL.Path)
	if err != nil {
		return err
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return s.change(w, r, t)
	}
	switch t.kind {
	case kindBase:
		return w.json(http.StatusOK, "application/json", struct{}{})
	case kindCatalog:
		return s.catalog(w, r)
	case kindTags:
		return s.tags(w, r, t)
	case kindReferrers:
		return s.referrers(w, r, t)
	case kindManifests:
		return s.manifest(w, r, t)
	case kindUploads:
		return s.uploadStatus(w, r, t)
	default:
		return s.blob(w, r, t)
	}
}

// trustedHost reports whether a request can't come from a web page whose host name an attacker has pointed at a
// loopback address (DNS rebinding). A browser takes such a page for one of this server, and sends no Origin. With TLS
// there is no certificate for the name.
func trustedHost(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok || !local.IP.IsLoopback() || r.TLS != nil {
		return true
	}
	host := (&url.URL{Host: r.Host}).Hostname()
	_, err := netip.ParseAddr(host)
	return err == nil || strings.EqualFold(strings.TrimSuffix(host, "."), "localhost")
}

// The kinds of paths.
const (
	kindBase      = "" // /v2/
	kindCatalog   = "_catalog"
	kindTags      = "tags"
	kindReferrers = "referrers"
	kindManifests = "manifests"
	kindBlobs     = "blobs"
	kindUploads   = "uploads"
)

// target is a parsed path.
type target struct {
	kind       string
	repository string
	// object is a tag or digest, or the ID of an upload, "" for a new one.
	object string
	digest digest.Digest // of the object; "" if it is a tag or an upload
}

func (t target) path(kind, object string) string {
	return "/v2/" + t.repository + "/" + kind + "/" + object
}

// parsePath parses a path from its end, because a repository may have components such as blobs.
func parsePath(path string) (target, error) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	switch {
	case path == "/v2" || ok && rest == "":
		return target{}, nil
	case ok && rest == kindCatalog:
		return target{kind: kindCatalog}, nil
	}
	parts := strings.Split(rest, "/")
	t := target{}
	i := len(parts) - 2 // position of the kind
	if !ok || i < 1 {
		return t, errNoPath
	}
	t.kind, t.object = parts[i], parts[i+1]
	switch {
	case t.kind == kindTags && t.object == "list", t.kind == kindReferrers, t.kind == kindManifests:
	case t.kind == kindBlobs && t.object == kindUploads:
		t.kind, t.object = kindUploads, ""
	case t.kind == kindBlobs:
	case t.kind == kindUploads && i > 1 && parts[i-1] == kindBlobs:
		i--
	default:
		return t, errNoPath
	}
	if t.repository = strings.Join(parts[:i], "/"); !refname.IsRepository(t.repository) {
		return t, refuse(http.StatusBadRequest, codeNameInvalid, "%s is not the name of a repository", printable(t.repository))
	}
	switch {
	case t.kind == kindTags, t.kind == kindUploads, t.kind == kindManifests && refname.IsTag(t.object):
		return t, nil
	case t.kind == kindManifests && !strings.Contains(t.object, ":"):
		return t, refuse(http.StatusBadRequest, codeManifestInvalid, "%s is neither a tag nor a digest", printable(t.object))
	}
	t.digest = digest.Digest(t.object)
	return t, checkDigest(t.digest)
}

var errNoPath = refuse(http.StatusNotFound, codeNameUnknown, "no such path: the paths of a registry begin with /v2/")

func checkDigest(d digest.Digest) error {
	if err := content.Validate(d); err != nil {
		return refuse(http.StatusBadRequest, codeDigestInvalid, "digest %s: only sha256 and sha512 are supported", printable(string(d)))
	}
	return nil
}

// page parses the parameters n and last of a list: the number of elements, and the one before them.
func page(r *http.Request) (n int, last string, err error) {
	q := r.URL.Query()
	n = maxPage
	if text := q.Get("n"); text != "" {
		wanted, err := strconv.ParseUint(text, 10, 31)
		if err != nil {
			return 0, "", refuse(http.StatusBadRequest, codePageInvalid, "n=%s is not a number of elements", printable(text))
		}
		n = min(int(wanted), n)
	}
	return n, q.Get("last"), nil
}

// maxPage bounds the elements in a reply. Each has up to about 128 bytes.
const maxPage = 10000

// reply writes a reply. It gives up on a client that doesn't read.
type reply struct {
	http.ResponseWriter
	control *http.ResponseController
	r       *http.Request
	begun   bool // the status has been sent
	status  int
	bytes   int64
}

const (
	// stall is how long a client may take for a piece of a body, in either direction.
	stall = time.Minute
	piece = 1 << 20
)

func newReply(w http.ResponseWriter, r *http.Request) *reply {
	p := &reply{ResponseWriter: w, control: http.NewResponseController(w), r: r, status: http.StatusOK}
	_ = p.control.SetWriteDeadline(time.Now().Add(stall)) // for "100 Continue"
	if r.ContentLength != 0 {
		_ = p.control.SetReadDeadline(time.Now().Add(stall))
	}
	return p
}

// WriteHeader implements http.ResponseWriter. It starts the time for reading the reply, since the request's body may
// have taken longer.
func (p *reply) WriteHeader(status int) {
	p.begun, p.status = true, status
	_ = p.control.SetWriteDeadline(time.Now().Add(stall))
	p.ResponseWriter.WriteHeader(status)
}

func (p *reply) Write(b []byte) (int, error) {
	n, err := p.ResponseWriter.Write(b)
	p.bytes += int64(n)
	return n, err
}

// ReadFrom lets the kernel move a file to the connection, piece by piece, each with its own deadline. net/http does so
// only if the source is an *io.LimitedReader of the file itself.
func (p *reply) ReadFrom(src io.Reader) (total int64, err error) {
	limited, ok := src.(*io.LimitedReader)
	if !ok {
		limited = &io.LimitedReader{R: src, N: 1<<63 - 1}
	}
	for limited.N > 0 {
		_ = p.control.SetWriteDeadline(time.Now().Add(stall))
		part := &io.LimitedReader{R: limited.R, N: min(limited.N, piece)}
		n, err := io.Copy(p.ResponseWriter, part)
		limited.N -= n
		total += n
		p.bytes += n
		if err != nil {
			return total, err
		}
		if part.N > 0 {
			break // the source has ended
		}
	}
	return total, nil
}

// fail sends an error reply. If the reply has begun it closes the connection instead, so that the client notices.
func (p *reply) fail(err error) {
	var refused *refusal
	if !errors.As(err, &refused) {
		refused = refusalOf(err)
	}
	if p.begun {
		panic(http.ErrAbortHandler)
	}
	for name := range refused.headers {
		p.Header().Set(name, refused.headers.Get(name))
	}
	type detail struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Detail  any    `json:"detail,omitempty"`
	}
	body := struct {
		Errors []detail `json:"errors"`
	}{[]detail{{refused.code, refused.message, refused.detail}}}
	if jerr := p.json(refused.status, "application/json", body); jerr != nil {
		panic(http.ErrAbortHandler)
	}
}

func notFound(code, format string, a ...any) *refusal {
	return refuse(http.StatusNotFound, code, format, a...)
}
