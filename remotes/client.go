package remotes

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Time limits. A registry that refuses connections is given up after tries of about three seconds.
const (
	dialTimeout = 10 * time.Second
	// defaultTimeout is how long a host may be silent over all tries of an operation. It is long because a caching
	// registry replies only when it has fetched the object itself.
	defaultTimeout = 2 * time.Minute
	// mirrorTimeout is the timeout of a host that isn't the last one to try.
	mirrorTimeout = 30 * time.Second
	// stallTimeout is how long a body may pause before it is requested again.
	stallTimeout = 30 * time.Second
	// commitTimeout is how long a registry may take to reply after it has received all of an upload.
	commitTimeout  = 5 * time.Minute
	defaultMaxWait = time.Minute
	maxRedirects   = 10
	readBuffer     = 32 << 10
)

var errRedirect = errors.New("redirect refused")

// client sends HTTP requests to one endpoint, with its certificates, headers and authentication, and repeats them after
// temporary failures.
type client struct {
	endpoint
	http    *auth.Client
	login   *login
	tokens  *tokenCache
	options Options
	timeout time.Duration // for the header of a reply, and for the total silence in an operation
	stall   time.Duration // for a pause in a body
	pause   time.Duration
	chunk   int64       // how much of an upload is sent in one request
	shared  string      // the directory with state that processes share
	https   atomic.Bool // HTTP was guessed and proved wrong
	// wanted: the host asked for a client certificate, and none is configured. replied: the host has replied to a
	// request, so it doesn't insist on one.
	wanted, replied atomic.Bool
	warned          warnings
}

func newClient(e endpoint, o Options, login *login) *client {
	c := &client{endpoint: e, login: login, options: o, pause: firstPause, chunk: chunkSize, shared: sharedDir()}
	if c.options.MaxWait == 0 {
		c.options.MaxWait = defaultMaxWait
	}
	if o.Streams > 1 {
		c.chunk = batchChunkSize
	}
	c.timeout = cmp.Or(o.Timeout, defaultTimeout)
	c.stall = min(stallTimeout, c.timeout)
	dial := dialTimeout
	if e.dialTimeout > 0 {
		dial = e.dialTimeout
	}
	t := &http.Transport{
		Proxy:                 e.proxyFor,
		DialContext:           (&net.Dialer{Timeout: dial, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       e.tls,
		TLSHandshakeTimeout:   dialTimeout,
		IdleConnTimeout:       30 * time.Second,
		ExpectContinueTimeout: time.Second,
		// No HTTP/2: with one body per connection it gains nothing, takes a fifth more CPU and 3 MiB for a stream's
		// window, and that window limits the speed over long distances.
		TLSNextProto:           map[string]func(string, *tls.Conn) http.RoundTripper{},
		OnProxyConnectResponse: proxyReply,
		// Content is hashed as it is stored, so it must not be decompressed on the way.
		DisableCompression:     true,
		MaxResponseHeaderBytes: 1 << 20,
		MaxIdleConnsPerHost:    max(2, o.Parts, o.Streams),
		MaxConnsPerHost:        o.Streams, // each stream uses one at a time
		ReadBufferSize:         readBuffer,
	}
	if o.Parts > 1 {
		// Reads are large enough to bypass the connection's buffer.
		t.ReadBufferSize = 4 << 10
	}
	if t.TLSClientConfig == nil {
		t.TLSClientConfig = &tls.Config{}
	}
	if t.TLSClientConfig.Certificates == nil {
		t.TLSClientConfig = t.TLSClientConfig.Clone()
		t.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			c.wanted.Store(true)
			return &tls.Certificate{}, nil
		}
	}
	c.tokens = newTokenCache(e, login, c.shared)
	c.http = &auth.Client{
		Client:     &http.Client{Transport: roundTripper{t, c}, CheckRedirect: checkRedirect},
		Credential: c.credential,
		Cache:      c.tokens,
		ClientID:   "distkit",
		// admit decides about token servers instead, because it knows the registry's address and hosts.toml.
		BlockedRealmPrefixes: []netip.Prefix{},
	}
	return c
}

// proxyError is an error of the proxy in front of a host.
type proxyError struct{ error }

func (e *proxyError) Unwrap() error { return e.error }

// proxyForm describes how to write a proxy's address.
const proxyForm = "write http://[USER:PASSWORD@]HOST:PORT, with %XX for characters of the password other than letters and digits"

func isProxyAddress(u *url.URL) bool {
	return slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme) &&
		u.Hostname() != "" && strings.Trim(u.Path, "/") == "" && u.RawQuery == "" && u.Fragment == ""
}

// proxyFor returns the proxy for a request: that in the host's configuration or, without one, the environment's. It
// refuses a malformed address, for example one with an unescaped character in the password, which net/http ignores or
// takes for another host's.
func (e *endpoint) proxyFor(req *http.Request) (*url.URL, error) {
	if e.proxy != nil {
		return e.proxy, nil
	}
	u, err := http.ProxyFromEnvironment(req)
	name := strings.ToUpper(req.URL.Scheme) + "_PROXY"
	ok := err == nil
	if u == nil {
		text := cmp.Or(os.Getenv(name), os.Getenv(strings.ToLower(name)))
		_, err := url.Parse(text)
		if err != nil {
			_, err = url.Parse("http://" + text)
		}
		ok = ok && (err == nil || isLoopback(req.URL.Host))
	} else {
		ok = ok && isProxyAddress(u)
	}
	if !ok { // don't show the address, which may hold a password
		return nil, &proxyError{classf(errdefs.ErrInvalidArgument, "malformed proxy address in %s: %s", name, proxyForm)}
	}
	return u, nil
}

// proxyReply turns a proxy's refusal to open a tunnel into an error.
func proxyReply(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &proxyError{fmt.Errorf("the proxy %s refuses: %w", proxy.Host, &statusError{status: resp.StatusCode, class: classOfStatus(resp.StatusCode)})}
}

// keptHeaders are the headers that are also sent to another origin after a redirect. None can hold a secret.
var keptHeaders = []string{"Accept", "Accept-Encoding", "Range", "User-Agent"}

// checkRedirect refuses a redirect from TLS to clear text, except for a blob that is read by its digest, and a redirect
// of a request with a body to another origin. A request that has left its origin keeps only keptHeaders, even if it is
// redirected back.
func checkRedirect(req *http.Request, via []*http.Request) error {
	first := via[0].URL
	if len(via) >= maxRedirects {
		return fmt.Errorf("%w: more than %d", errRedirect, maxRedirects)
	}
	if s := req.URL.Scheme; s != "http" && s != "https" {
		return fmt.Errorf("%w: to scheme %s", errRedirect, printable(s))
	}
	isTLS := func(r *http.Request) bool { return r.URL.Scheme == "https" }
	state := authStateOf(req)
	isBlob := state.isBlob && first.String() == state.url.String() // false for a token request
	if req.URL.Scheme == "http" && slices.ContainsFunc(via, isTLS) && !isBlob {
		return fmt.Errorf("%w: from https to http://%s", errRedirect, printable(req.URL.Host))
	}
	left := func(r *http.Request) bool { return !sameOrigin(first, r.URL) && !isUpgrade(first, r.URL) }
	if !left(req) && !slices.ContainsFunc(via, left) {
		return nil
	}
	if hasBody(req) {
		return fmt.Errorf("%w: an upload to %s", errRedirect, printable(origin(req.URL)))
	}
	kept := http.Header{}
	for _, name := range keptHeaders {
		if v := req.Header.Values(name); len(v) > 0 {
			kept[name] = v
		}
	}
	clear(req.Header)
	maps.Copy(req.Header, kept)
	return nil
}

// roundTripper sees each single request, including those after redirects and token requests.
type roundTripper struct {
	http.RoundTripper
	c *client
}

func (t roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	state := authStateOf(req)
	// The context has the mark of tokenCache, except after an upgrade to TLS, when oras asks for a token without it.
	_, isToken := req.Context().Value(tokenRequestKey{}).(bool)
	isToken = isToken || req.Response == nil && !sameOrigin(req.URL, state.url) && !t.c.isOwn(req.URL)
	if sent, ok := req.Context().Value(sentKey{}).(*string); ok && !isToken && t.c.isOwn(req.URL) {
		*sent = req.Header.Get("Authorization")
	}
	if err := t.c.admit(req, isToken); err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		if t.c.options.Debug != nil {
			t.c.options.Debug(debugLine(req, nil, fmt.Errorf("not sent: %w", err), 0))
		}
		return nil, err
	}
	req.Header.Set("User-Agent", "distkit")
	start := time.Now()
	resp, err := t.RoundTripper.RoundTrip(req)
	if t.c.options.Debug != nil {
		t.c.options.Debug(debugLine(req, resp, err, time.Since(start)))
	}
	if err != nil {
		if !isToken && t.c.isOwn(req.URL) {
			state.unanswered.Store(true)
		}
		return resp, err
	}
	t.c.replied.Store(true)
	if _, err := resp.Location(); err != nil && err != http.ErrNoLocation && resp.StatusCode/100 == 3 {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: to %q, which is no address", errRedirect, printable(resp.Header.Get("Location")))
	}
	if isToken {
		if err := t.c.admitTokenRedirect(resp); err != nil {
			resp.Body.Close()
			return nil, err
		}
		resp.Body = &tokenBody{resp.Body, req.URL.Host, maxToken}
	} else if resp.StatusCode == http.StatusUnauthorized {
		state.challenged.Store(true)
		keepConnection(resp)
		t.c.login.offer(chooseChallenge(resp.Header))
	}
	return resp, nil
}

// keepConnection reads the body of a 401 reply, so that the connection can be reused. oras sends the request again
// without reading it.
func keepConnection(resp *http.Response) {
	var b bytes.Buffer
	_, err := b.ReadFrom(io.LimitReader(resp.Body, maxErrorBody+1))
	if err != nil || b.Len() > maxErrorBody {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{&b, resp.Body}
		return
	}
	resp.Body.Close()
	resp.Body = io.NopCloser(&b)
}

// maxToken bounds the reply of a token server. It is smaller than oras' own limit, where oras truncates silently: so an
// endless reply is an error.
const maxToken = 64 << 10

type tokenBody struct {
	io.ReadCloser
	host string
	left int
}

func (b *tokenBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch b.left -= n; {
	case b.left < 0:
		return 0, &badTokenError{b.host, "longer than " + sizeString(maxToken)}
	case b.left == maxToken && err == io.EOF:
		return 0, &badTokenError{b.host, "empty"}
	}
	return n, err
}

// badTokenError reports that a token server's reply can't be a token.
type badTokenError struct{ host, what string }

func (e *badTokenError) Error() string {
	return fmt.Sprintf("get a token from %s: the reply is %s", e.host, e.what)
}

// debugLine describes a request and its reply. It leaves out the query, which may be a signature, and all headers but
// the range.
func debugLine(req *http.Request, resp *http.Response, err error, d time.Duration) string {
	u := url.URL{Scheme: req.URL.Scheme, Host: req.URL.Host, Path: req.URL.Path}
	s := req.Method + " " + u.String()
	if req.URL.RawQuery != "" {
		s += "?…"
	}
	if r := req.Header.Get("Range"); r != "" {
		s += " " + r
	}
	if kind, _, ok := strings.Cut(req.Header.Get("Authorization"), " "); ok {
		s += " (" + kind + ")"
	}
	if err != nil {
		s += ": " + err.Error()
	} else {
		s += ": " + resp.Status
		if resp.ContentLength >= 0 {
			s += " " + sizeString(resp.ContentLength)
		}
	}
	return printable(s + " in " + d.Round(100*time.Microsecond).String())
}
