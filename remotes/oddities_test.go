package remotes

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// This table combines every request that a client makes with everything that may be unusual about the reply:
// {operation} × {oddity}. For each cell it checks that the outcome is an expected one (the correct result, or an error
// of a class), that the registry's secrets were sent to nobody else, that the error is one line, and that there were
// few requests.
//
// To add a request, add an operation: how it is made (run), which of its requests gets the unusual reply (at), and the
// expected outcome (want; check, if the registry's own state matters). To add an oddity, add it to oddities. If an
// operation's outcome is not the usual one of the oddity, list it in the operation's expect.

// operation is an operation of a client, with the one of its requests that gets the unusual reply.
type operation struct {
	name string
	// at is the request's method, a space, and a part of its path.
	at      string
	options Options
	setup   func(f *fake) // if not nil, is called with the registry after fill has run
	chunk   int64         // if not 0, the length of an upload's chunks
	lost    string        // the method of a request whose first reply is lost, after the registry has done what it asks
	isToken bool          // the registry requires a token, which it issues for the password
	// hasIdentity is set if the user has an identity token instead of a password.
	hasIdentity bool
	run         func(r *Registry) (string, error)
	want        string // the correct result
	// check, if not nil, inspects the registry after a success.
	check func(f *fake) error
	// isHint is set if another request makes up for whatever the reply to this one says.
	isHint bool
	// expect has outcomes by the oddity's name, or by the beginning of the name followed by *.
	expect map[string]string
}

// oddity is one way in which a reply is unusual.
type oddity struct {
	name   string
	answer func(x *exchange)
	// want lists the expected outcomes, with | between them.
	want string
	once bool // only the first reply is changed
}

// Outcomes of an operation.
const (
	right     = "right"
	wrong     = "wrong" // success with an incorrect result
	notFound  = "not found"
	refused   = "refused"
	damaged   = "damaged"
	temporary = "temporary"
	other     = "other"
)

func outcome(op operation, got string, err error, f *fake) string {
	switch {
	case err == nil && got != op.want:
		return wrong
	case err == nil:
		if op.check != nil {
			if err := op.check(f); err != nil {
				return wrong + ": " + err.Error()
			}
		}
		return right
	case errdefs.IsNotFound(err):
		return notFound
	case errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err):
		return refused
	case errdefs.IsDataLoss(err):
		return damaged
	case isTemporary(err):
		return temporary
	}
	return other
}

// exchange is a request with its correct reply, which an oddity changes and sends.
type exchange struct {
	w         http.ResponseWriter
	r         *http.Request
	status    int
	header    [][2]string
	body      []byte
	elsewhere map[string]string               // URLs of other servers that have the same content
	cutAt     int                             // the number of bytes of the body that are sent; -1: all
	serve     func(r *http.Request) *exchange // returns the correct reply to another request
}

// otherRange replies correctly to the request with another range, or with none if edit returns "". A request without a
// range is left as it is.
func (x *exchange) otherRange(edit func(begin, end string) string) {
	if asked, ok := strings.CutPrefix(x.r.Header.Get("Range"), "bytes="); ok {
		begin, end, _ := strings.Cut(asked, "-")
		r := x.r.Clone(x.r.Context())
		if r.Header.Del("Range"); edit(begin, end) != "" {
			r.Header.Set("Range", "bytes="+edit(begin, end))
		}
		y := x.serve(r)
		x.status, x.header, x.body = y.status, y.header, y.body
	}
	x.send()
}

// send writes the reply as it is, byte for byte, and closes the connection.
func (x *exchange) send() {
	conn, _, err := x.w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\nConnection: close\r\n", x.status, cmp.Or(http.StatusText(x.status), "Odd"))
	for _, h := range x.header {
		fmt.Fprintf(&b, "%s: %s\r\n", h[0], h[1])
	}
	b.WriteString("\r\n")
	if x.r.Method != http.MethodHead {
		if x.cutAt >= 0 {
			x.body = x.body[:min(x.cutAt, len(x.body))]
		}
		b.Write(x.body)
	}
	_, _ = conn.Write(b.Bytes())
}

func (x *exchange) get(name string) (value string, ok bool) {
	for _, h := range x.header {
		if strings.EqualFold(h[0], name) {
			return h[1], true
		}
	}
	return "", false
}

// set replaces the lines of a header.
func (x *exchange) set(name string, lines ...[2]string) {
	x.header = slices.DeleteFunc(x.header, func(h [2]string) bool { return strings.EqualFold(h[0], name) })
	x.header = append(x.header, lines...)
}

// empty makes the reply one with a status and without a body.
func (x *exchange) empty(status int) {
	x.status, x.header, x.body = status, [][2]string{{"Content-Length", "0"}}, nil
}

func oddCase(s string) string {
	b := []byte(strings.ToLower(s))
	for i := 1; i < len(b); i += 2 {
		b[i] = strings.ToUpper(s)[i]
	}
	return string(b)
}

// oddHeaders are headers with unusual values. They replace those that a reply has, and are added to replies without
// them.
var oddHeaders = []string{
	"Content-Type", "Content-Length", "Content-Encoding", "Content-Range", "Docker-Content-Digest", "ETag", "Link", "Location", "Range",
	"OCI-Subject", "OCI-Chunk-Min-Length", "RateLimit-Limit", "RateLimit-Remaining", "OCI-Filters-Applied", "Retry-After", "Www-Authenticate", "Warning", "Transfer-Encoding",
}

func oddities() (list []oddity) {
	add := func(name, want string, answer func(x *exchange)) {
		list = append(list, oddity{name: name, want: want, answer: answer})
	}
	for _, name := range oddHeaders {
		edit := func(kind, want string, lines func(value string) [][2]string) {
			add(name+" "+kind, want, func(x *exchange) {
				value, _ := x.get(name)
				x.set(name, lines(value)...)
				x.send()
			})
		}
		line := func(v string) [2]string { return [2]string{name, v} }
		if name != "Content-Length" && name != "Transfer-Encoding" {
			edit("in odd case", right, func(v string) [][2]string {
				if v == "" {
					return nil
				}
				return [][2]string{{oddCase(name), v}}
			})
		}
		malformed := right // errors in the syntax of HTTP itself
		if name == "Content-Length" || name == "Transfer-Encoding" {
			malformed = temporary
		}
		edit("absent", right, func(string) [][2]string { return nil })
		edit("twice", right, func(v string) [][2]string {
			if v == "" {
				return nil
			}
			return [][2]string{line(v), line(v)}
		})
		edit("empty", malformed, func(string) [][2]string { return [][2]string{line("")} })
		edit("garbage", malformed, func(string) [][2]string { return [][2]string{line(";,<\"=%zz")} })
		edit("enormous", malformed, func(string) [][2]string { return [][2]string{line(strings.Repeat("9", 100_000))} })
		edit("with control characters", temporary, func(string) [][2]string { return [][2]string{line("\x1b[31m")} })
		if name == "Link" {
			edit("too large", temporary, func(string) [][2]string { return [][2]string{line(strings.Repeat("9", 2<<20))} })
		}
	}
	for status := 200; status <= 999; status++ {
		if http.StatusText(status) == "" && !slices.Contains([]int{420, 444, 499, 520, 521, 522, 523, 524, 530, 599, 600, 999}, status) {
			continue
		}
		name := fmt.Sprintf("status %d", status)
		add(name, statusOutcome(status), func(x *exchange) { x.empty(status); x.send() })
		if status >= 400 {
			add(name+" with errors", statusOutcome(status), func(x *exchange) {
				body := `{"errors":[{"code":"ODD","message":"\u001b[31m very\nodd"}]}`
				x.empty(status)
				x.body, x.header = []byte(body), [][2]string{{"Content-Type", "application/json"}, {"Content-Length", fmt.Sprint(len(body))}}
				x.send()
			})
		}
	}
	for _, status := range []int{408, 429, 500, 502, 503, 504} {
		list = append(list, oddity{fmt.Sprintf("once status %d", status), func(x *exchange) { x.empty(status); x.send() }, right, true})
	}
	for name, after := range map[string]string{"an hour": "3600", "garbage": "soon", "nothing": "", "ages": strings.Repeat("9", 1000), "negative": "-1"} {
		add("asks to wait for "+name, temporary, func(x *exchange) {
			x.empty(429)
			x.set("Retry-After", [2]string{"rETRY-aFTER", after})
			x.send()
		})
	}
	for _, status := range []int{301, 302, 303, 307, 308} {
		for where, outcome := range map[string]string{"other port": right, "TLS": right, "clear text": right, "nowhere": temporary, "ftp": other, "garbage": other, "itself": other} {
			add(fmt.Sprintf("redirect %d to %s", status, where), outcome, func(x *exchange) {
				scheme := "http"
				if x.r.TLS != nil {
					scheme = "https"
				}
				to := map[string]string{"nowhere": scheme + "://127.0.0.1:1/", "ftp": "ftp://127.0.0.1/", "garbage": "http://[::1:/%zz", "itself": x.r.URL.RequestURI()}[where]
				if base := x.elsewhere[where]; base != "" {
					to = base + x.r.URL.RequestURI()
				}
				x.empty(status)
				x.set("Location", [2]string{"lOCATION", to})
				x.send()
			})
		}
	}
	for _, n := range []int{0, 1, 10} {
		add(fmt.Sprintf("cut after %d bytes", n), temporary, func(x *exchange) { x.cutAt = n; x.send() })
		list = append(list, oddity{fmt.Sprintf("once cut after %d bytes", n), func(x *exchange) { x.cutAt = n; x.send() }, right, true})
	}
	add("ignores Range", right, func(x *exchange) { x.otherRange(func(string, string) string { return "" }) })
	add("sends a longer range", right, func(x *exchange) { x.otherRange(func(begin, _ string) string { return begin + "-" }) })
	add("sends an earlier range", right, func(x *exchange) { x.otherRange(func(_, end string) string { return "1-" + end }) })
	list = append(list, oddity{"once sends a shorter range", func(x *exchange) {
		x.otherRange(func(begin, _ string) string { return begin + "-" + begin })
	}, right, true})
	add("closed", temporary, func(x *exchange) { panic(http.ErrAbortHandler) })
	list = append(list, oddity{"once closed", func(x *exchange) { panic(http.ErrAbortHandler) }, right, true})
	replaceBody := func(name, want string, body string) {
		add(name, want, func(x *exchange) {
			x.body = []byte(body)
			x.set("Content-Length", [2]string{"Content-Length", fmt.Sprint(len(body))})
			x.send()
		})
	}
	replaceBody("empty body", damaged, "")
	replaceBody("web page", damaged, "<!DOCTYPE html><title>Sign in</title>")
	replaceBody("null", damaged, "null")
	replaceBody("list", damaged, "[]")
	replaceBody("braces", damaged, strings.Repeat("{", 1<<20))
	replaceBody("NUL", damaged, strings.Repeat("\x00", 1000))
	add("not HTTP", temporary, func(x *exchange) {
		conn, _, err := x.w.(http.Hijacker).Hijack()
		if err == nil {
			_, _ = io.WriteString(conn, "220 \x1b[31mmail.example ESMTP\r\n")
			conn.Close()
		}
	})
	return list
}

// statusOutcome returns the outcome of a status without a body, for a request that reads.
func statusOutcome(status int) string {
	switch status {
	case 401, 403, 407:
		return refused
	case 404:
		return notFound
	case 408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524:
		return temporary
	}
	if status < 300 {
		return damaged
	}
	return other
}

// expected returns the expected outcomes of a cell.
func (op operation) expected(o oddity) string {
	if want, ok := op.expect[o.name]; ok {
		return want
	}
	best := ""
	for name := range op.expect {
		if prefix, ok := strings.CutSuffix(name, "*"); ok && strings.HasPrefix(o.name, prefix) && len(name) > len(best) {
			best = name
		}
	}
	if best != "" {
		return op.expect[best]
	}
	if op.isHint && o.want != temporary {
		return right
	}
	return o.want
}

// oddWorld is the registry with the unusual replies, and the other servers.
type oddWorld struct {
	*fake
	elsewhere map[string]*recorder
	urls      map[string]string
	options   Options
	isTLS     bool
}

const oddSecret = "S3CRET"

// newOddWorld starts the servers. With isTLS the registry has TLS.
func newOddWorld(t *testing.T, isTLS bool) *oddWorld {
	w := &oddWorld{fake: unstarted(), elsewhere: map[string]*recorder{}, urls: map[string]string{}, isTLS: isTLS}
	if isTLS {
		w.StartTLS()
	} else {
		w.Start()
	}
	t.Cleanup(w.Close)
	for name, start := range map[string]func(http.Handler) *httptest.Server{"other port": httptest.NewServer, "clear text": httptest.NewServer, "TLS": httptest.NewTLSServer} {
		if isTLS && name == "other port" {
			start = httptest.NewTLSServer
		}
		rec := &recorder{next: w.serve}
		rec.Server = start(rec)
		rec.Config.ErrorLog = quiet
		t.Cleanup(rec.Close)
		w.elsewhere[name], w.urls[name] = rec, rec.URL
	}
	root := t.TempDir()
	writeHosts(t, root, w.host(), fmt.Sprintf("server = '%s'\nskip_verify = true\n[header]\nX-Key = '%s'\n", w.URL, oddSecret))
	w.options = Options{HostsDir: root, AuthFile: w.authFile(t, "me:"+oddSecret), MaxWait: 10 * time.Millisecond, Timeout: 5 * time.Second}
	return w
}

// cell runs one operation against one oddity.
func (w *oddWorld) cell(t *testing.T, op operation, o oddity) {
	w.mu.Lock()
	w.blobs, w.manifests, w.uploads = map[digest.Digest][]byte{}, map[string]entry{}, map[string][]byte{}
	w.mu.Unlock()
	w.fill()
	if op.setup != nil {
		op.setup(w.fake)
	}
	for _, s := range w.elsewhere {
		s.mu.Lock()
		s.all = nil
		s.mu.Unlock()
	}
	odd, lost := 0, false
	method, path, _ := strings.Cut(op.at, " ")
	w.reply(func(rw http.ResponseWriter, r *http.Request, n int) bool {
		_, password, _ := r.BasicAuth()
		isIn, challenge := password == oddSecret, `Basic realm="x"`
		if op.hasIdentity && r.URL.Path == "/token" {
			isIn = r.PostFormValue("refresh_token") == oddSecret
		}
		if op.isToken && r.URL.Path != "/token" {
			isIn, challenge = r.Header.Get("Authorization") == "Bearer "+oddSecret, `Bearer realm="`+w.URL+`/token",service="x"`
		}
		if !isIn || r.Header.Get("X-Key") != oddSecret && r.URL.Path != "/token" {
			rw.Header().Set("Www-Authenticate", challenge)
			rw.WriteHeader(http.StatusUnauthorized)
			return true
		}
		w.mu.Lock()
		isLost := r.Method == op.lost && !lost
		lost = lost || isLost
		w.mu.Unlock()
		if isLost {
			w.serve(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		if r.Method != method || !strings.Contains(r.URL.Path, path) {
			return false
		}
		w.mu.Lock()
		odd++
		isOdd := odd == 1 || !o.once
		w.mu.Unlock()
		if !isOdd {
			return false
		}
		serve := func(r *http.Request) *exchange {
			rec := httptest.NewRecorder()
			w.serve(rec, r)
			x := &exchange{w: rw, r: r, status: rec.Code, body: rec.Body.Bytes(), elsewhere: w.urls, cutAt: -1}
			for name, values := range rec.Header() {
				for _, v := range values {
					x.header = append(x.header, [2]string{name, v})
				}
			}
			if _, ok := x.get("Content-Length"); !ok {
				x.header = append(x.header, [2]string{"Content-Length", fmt.Sprint(len(x.body))})
			}
			return x
		}
		x := serve(r)
		x.serve = serve
		o.answer(x)
		return true
	})
	options := w.options
	options.Unverified, options.Parts = op.options.Unverified, op.options.Parts
	if op.hasIdentity {
		options.AuthFile = filepath.Join(t.TempDir(), "auth.json")
		if err := os.WriteFile(options.AuthFile, fmt.Appendf(nil, `{"auths":{%q:{"identitytoken":%q}}}`, w.host(), oddSecret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r := open(t, w.host(), options)
	if op.chunk > 0 {
		r.own().chunk = op.chunk
	}
	got, err := op.run(r)
	if odd == 0 {
		t.Errorf("%s: no request for %s in %q", op.name, op.at, w.seen())
		return
	}
	want := op.expected(o)
	if _, ok := op.expect[o.name]; !ok && w.isTLS && strings.HasSuffix(o.name, "clear text") && method != http.MethodHead && path != "/blobs/" {
		want = map[bool]string{false: other, true: refused}[op.isToken] // only a blob that is read by its digest may come from there
	}
	if come := outcome(op, got, err, w.fake); !slices.Contains(strings.Split(want, "|"), come) {
		t.Errorf("%s, %s: %s, not %s: %.60q, %v", op.at, o.name, come, want, got, err)
	}
	if err != nil {
		if s := err.Error(); strings.ContainsAny(s, "\n\r\x1b") || len(s) > 1500 || strings.Contains(s, oddSecret) {
			t.Errorf("%s, %s %s: not one clear line: %.200q", op.name, op.at, o.name, s)
		}
	}
	for name, s := range w.elsewhere {
		if seen := s.seen(); tellsSecret(seen) {
			t.Errorf("%s, %s %s: %s got %.300s", op.name, op.at, o.name, name, seen)
		}
	}
	if n := w.count(); n > 40 {
		t.Errorf("%s, %s %s: %d requests", op.name, op.at, o.name, n)
	}
}

// The content that operations read.
var (
	oddBlob  = noise(3000)
	oddIndex = []byte(`{"schemaVersion":2,"manifests":[],"annotations":{"for":"the table of oddities"}}`)
)

func (f *fake) fill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blob(oddBlob)
	f.manifest("latest", ocispec.MediaTypeImageIndex, oddIndex)
	f.tags = []string{"a", "b", "c"}
}

// operations has all operations that are tested. Other files add theirs.
var operations = slices.Concat(readOperations, writeOperations)

// with404 adds that after 404 for a digest the object counts as missing.
func with404(expect map[string]string) map[string]string {
	return merged(expect, "status 404*", notFound)
}

// headOutcomes are for HEAD requests. Their replies can't be verified, and a GET follows if one refuses.
var headOutcomes = map[string]string{
	"status 401*": refused, "status 407*": refused, "cut*": right, "web page": wrong, "null": wrong, "list": wrong, "braces": wrong, "NUL": wrong,
}

// rangeOutcomes are for the rest of a blob, of which only the length is verified. cutOutcomes are for a part that ends
// before the blob does: bytes after the part are not read.
var (
	rangeOutcomes = map[string]string{
		"status 200": other, "status 203": other, "empty body": temporary, "web page": temporary, "null": temporary, "list": temporary, "NUL": wrong,
	}
	cutOutcomes       = merged(rangeOutcomes, "braces", wrong)
	rangesOfKnownSize = merged(rangeOutcomes, "status 200", damaged, "status 203", damaged)
)

// merged returns the outcomes with others added, which are given as an oddity's name and its outcome.
func merged(outcomes map[string]string, others ...string) map[string]string {
	outcomes = maps.Clone(outcomes)
	for pair := range slices.Chunk(others, 2) {
		outcomes[pair[0]] = pair[1]
	}
	return outcomes
}

// listOutcomes are for lists in pages.
var listOutcomes = map[string]string{"Link absent": wrong, "Link empty": wrong, "Link garbage": damaged, "Link enormous": damaged}

// tokenOutcomes are for requests for a token. A token server that issues none refuses, whatever its reply.
var tokenOutcomes = func() map[string]string {
	outcomes := map[string]string{"status*": refused, "empty body": refused, "web page": refused, "null": refused, "list": refused, "braces": refused, "NUL": refused}
	for _, status := range []int{408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524} {
		outcomes[fmt.Sprintf("status %d*", status)] = temporary
	}
	for _, status := range []int{301, 302, 303, 307, 308} {
		outcomes[fmt.Sprintf("redirect %d to ftp", status)] = refused
	}
	return outcomes
}()

// postedOutcomes are for requests for a token that have a secret in their body. Such requests follow no redirect.
var postedOutcomes = func() map[string]string {
	outcomes := maps.Clone(tokenOutcomes)
	for _, status := range []int{301, 302, 303, 307, 308} {
		if status <= 303 {
			outcomes[fmt.Sprintf("redirect %d to itself", status)] = refused
			continue
		}
		outcomes[fmt.Sprintf("redirect %d to*", status)] = refused
		outcomes[fmt.Sprintf("redirect %d to itself", status)], outcomes[fmt.Sprintf("redirect %d to garbage", status)] = other, other
	}
	return outcomes
}()

// limitOutcomes are for the request for limits. Only the header has these. Limits that are not stated are unknown.
var limitOutcomes = map[string]string{
	"redirect 301 to clear text": right + "|" + other, "redirect 302 to clear text": right + "|" + other, "redirect 303 to clear text": right + "|" + other,
	"redirect 307 to clear text": right + "|" + other, "redirect 308 to clear text": right + "|" + other, // other, if the request used TLS
	"RateLimit-Limit absent": wrong, "RateLimit-Limit empty": wrong, "RateLimit-Limit garbage": wrong, "RateLimit-Limit enormous": wrong,
	"RateLimit-Remaining absent": wrong, "RateLimit-Remaining empty": wrong, "RateLimit-Remaining garbage": wrong, "RateLimit-Remaining enormous": wrong,
	"status 2*": notFound, "cut*": right, "empty body": right, "web page": right, "null": right, "list": right, "braces": right, "NUL": right,
}

var readOperations = func() []operation {
	ctx := context.Background()
	index, blob := digest.FromBytes(oddIndex).String(), digest.FromBytes(oddBlob).String()
	read := func(id string, hints ...string) func(r *Registry) (string, error) {
		return func(r *Registry) (string, error) {
			body, err := r.Fetch(ctx, id, hints...)
			if err != nil {
				return "", err
			}
			defer body.Close()
			b, err := io.ReadAll(body)
			return string(b), err
		}
	}
	resolve := func(id string) func(r *Registry) (string, error) {
		return func(r *Registry) (string, error) {
			d, err := r.Resolve(ctx, id)
			return fmt.Sprint(d.Digest, " ", d.Size), err
		}
	}
	return []operation{
		{name: "fetch a tag", at: "GET /manifests/", run: read("latest"), want: string(oddIndex)},
		{name: "fetch a manifest", at: "GET /manifests/", run: read(index, "mediatype:"+ocispec.MediaTypeImageIndex), want: string(oddIndex)},
		{name: "fetch a blob", at: "GET /blobs/", run: read(blob), want: string(oddBlob)},
		{name: "fetch a blob unverified", at: "GET /blobs/", run: read(blob), want: string(oddBlob), options: Options{Unverified: true},
			expect: map[string]string{"status 200": wrong, "status 203": wrong, "empty body": wrong, "web page": wrong, "null": wrong, "list": wrong, "braces": wrong, "NUL": wrong}},
		{name: "fetch a blob of known size", at: "GET /blobs/", run: read(blob, "size:3000"), want: string(oddBlob)},
		{name: "fetch the rest of a blob", at: "GET /blobs/", run: read(blob, "offset:1000"), want: string(oddBlob[1000:]), expect: rangeOutcomes},
		{name: "fetch a range of a blob", at: "GET /blobs/", run: read(blob, "range:1000-1999"), want: string(oddBlob[1000:2000]), expect: cutOutcomes},
		{name: "fetch a range of a blob of known size", at: "GET /blobs/", run: read(blob, "range:1000-9999", "size:3000"), want: string(oddBlob[1000:]), expect: rangesOfKnownSize},
		{name: "fetch a range of a blob in parts", at: "GET /blobs/", run: read(blob, "range:1-2998"), want: string(oddBlob[1:2999]), options: Options{Parts: 4}, expect: cutOutcomes},
		{name: "fetch a range of a manifest", at: "GET /manifests/", run: read("latest", "range:3-20"), want: string(oddIndex[3:21])},
		{name: "fetch a blob in parts", at: "GET /blobs/", run: read(blob), want: string(oddBlob), options: Options{Parts: 4},
			expect: map[string]string{"web page": temporary, "null": temporary, "list": temporary}},
		{name: "resolve a tag", at: "HEAD /manifests/", run: resolve("latest"), want: fmt.Sprint(index, " ", len(oddIndex)), isHint: true, expect: headOutcomes},
		{name: "resolve a manifest", at: "HEAD /manifests/", run: resolve(index), want: fmt.Sprint(index, " ", len(oddIndex)), isHint: true, expect: with404(headOutcomes)},
		{name: "resolve a blob", at: "HEAD /blobs/", run: resolve(blob), want: blob + " 3000", isHint: true, expect: with404(headOutcomes)},
		{name: "get a token", at: "GET /token", isToken: true, run: read("latest"), want: string(oddIndex), expect: tokenOutcomes},
		{name: "get a token by POST", at: "POST /token", isToken: true, hasIdentity: true, run: read("latest"), want: string(oddIndex), expect: postedOutcomes},
		{name: "ask for the limits", at: "HEAD /manifests/", setup: func(f *fake) { f.limits = true }, run: func(r *Registry) (string, error) {
			l, err := RateLimits(ctx, r, "latest")
			return fmt.Sprint(l.Limit, " ", l.Remaining, " ", l.Window), err
		}, want: "100 76 6h0m0s", expect: limitOutcomes},
		{name: "list repositories", at: "GET /_catalog", run: func(r *Registry) (string, error) {
			var all []string
			for name, err := range r.repositories(ctx) {
				if err != nil {
					return "", err
				}
				all = append(all, name)
			}
			return strings.Join(all, " "), nil
		}, want: "a b c", expect: listOutcomes},
		{name: "list tags", at: "GET /tags/list", run: func(r *Registry) (string, error) {
			list, err := tags(r)
			return strings.Join(list, " "), err
		}, want: "a b c", expect: listOutcomes},
	}
}()

func TestOddities(t *testing.T) {
	t.Parallel()
	testOddities(t, false, "")
}

// With TLS, it matters where a redirect leads.
func TestOdditiesTLS(t *testing.T) {
	t.Parallel()
	testOddities(t, true, "redirect")
}

// testOddities tests every operation with the oddities whose names begin with prefix.
func testOddities(t *testing.T, isTLS bool, prefix string) {
	for _, op := range operations {
		t.Run(op.name, func(t *testing.T) {
			t.Parallel()
			w := newOddWorld(t, isTLS)
			for _, o := range oddities() {
				if strings.HasPrefix(o.name, prefix) {
					w.cell(t, op, o)
				}
			}
		})
	}
}
