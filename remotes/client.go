package remotes

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Limits of what is waited for. A registry that is down is given up after about three
// seconds of tries.
const (
	dialTimeout  = 10 * time.Second
	stallTimeout = 30 * time.Second
	// commitTimeout is what a registry has for its work once it has all of an upload.
	commitTimeout  = 5 * time.Minute
	maxTries       = 5
	firstPause     = 200 * time.Millisecond
	defaultMaxWait = time.Minute
	maxRedirects   = 10
	readBuffer     = 32 << 10
	// renewAfter is the progress of a download, in bytes, that gives it all tries again.
	renewAfter = 4 << 10
)

var (
	errStalled  = fmt.Errorf("no data came for %v", stallTimeout)
	errRedirect = errors.New("redirect refused")
)

// client speaks HTTP to one endpoint: with its certificates and headers, authenticated as
// it asks, and again after temporary failures.
type client struct {
	endpoint
	http    *auth.Client
	login   *login
	tokens  *tokenCache
	options Options
	stall   time.Duration
	pause   time.Duration
	shared  string      // the directory of what processes share
	https   atomic.Bool // a guessed scheme that proved wrong
	// A host that asked for a client's certificate where there is none, and one that has
	// replied whatever it asked for.
	wanted, replied atomic.Bool
}

func newClient(e endpoint, o Options, login *login) *client {
	c := &client{endpoint: e, login: login, options: o, stall: stallTimeout, pause: firstPause, shared: sharedDir()}
	if c.options.MaxWait == 0 {
		c.options.MaxWait = defaultMaxWait
	}
	dial := dialTimeout
	if e.dialTimeout > 0 {
		dial = e.dialTimeout
	}
	t := &http.Transport{
		Proxy:                  e.proxyFor,
		DialContext:            dialDirect(&net.Dialer{Timeout: dial, KeepAlive: 30 * time.Second}),
		TLSClientConfig:        e.tls,
		TLSHandshakeTimeout:    dialTimeout,
		IdleConnTimeout:        30 * time.Second,
		ForceAttemptHTTP2:      true,
		OnProxyConnectResponse: proxyReply,
		// What is hashed is what was stored: no compression is taken off on the way.
		DisableCompression:     true,
		MaxResponseHeaderBytes: 1 << 20,
		MaxIdleConnsPerHost:    max(2, o.Parts),
		ReadBufferSize:         readBuffer,
	}
	if o.Parts > 1 {
		// Pieces are large enough to pass by the buffer of each connection.
		t.ReadBufferSize = 4 << 10
		// HTTP/2 would carry all parts over one connection.
		t.ForceAttemptHTTP2, t.TLSNextProto = false, map[string]func(string, *tls.Conn) http.RoundTripper{}
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
		// admit judges token servers, with the registry's own address and hosts.toml in view.
		BlockedRealmPrefixes: []netip.Prefix{},
	}
	return c
}

// proxyError is of the proxy on the way to a host, and has its class.
type proxyError struct{ error }

func (e *proxyError) Unwrap() error { return e.error }

// proxyForm says how a proxy is written.
const proxyForm = "write http://[USER:PASSWORD@]HOST:PORT, and %XX for what is no letter or digit of the password"

func isProxyAddress(u *url.URL) bool {
	return slices.Contains([]string{"http", "https", "socks5", "socks5h"}, u.Scheme) &&
		u.Hostname() != "" && strings.Trim(u.Path, "/") == "" && u.RawQuery == "" && u.Fragment == ""
}

// proxyFor returns the proxy for a request: that of the host's configuration, else the environment's. An address that
// can't be read, as where a character of its password should be escaped, net/http ignores or takes for another host's.
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
	if !ok { // and nothing of it is shown: it may hold a password
		return nil, &proxyError{classf(errdefs.ErrInvalidArgument, "the proxy in %s is no address: %s", name, proxyForm)}
	}
	return u, nil
}

// proxyReply refuses a tunnel that the proxy does not give.
func proxyReply(_ context.Context, proxy *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	return &proxyError{fmt.Errorf("the proxy %s refuses: %w", proxy.Host, &statusError{status: resp.StatusCode, class: classOfStatus(resp.StatusCode)})}
}

// keptHeaders are those that a redirect to another origin still gets: none that could be a
// secret of the first.
var keptHeaders = []string{"Accept", "Accept-Encoding", "Range", "User-Agent"}

// checkRedirect refuses a redirect from TLS to clear text, except of a blob that is read by its digest,
// and a redirect of a body to another origin. A request that has left the first origin keeps only
// keptHeaders, even if it is sent back there.
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
	isBlob := state.isBlob && first.String() == state.url.String() // and not what asks for a token
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

// roundTripper sees every single request, those of redirects and for tokens too.
type roundTripper struct {
	http.RoundTripper
	c *client
}

func (t roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	state := authStateOf(req)
	// After an upgrade to TLS, oras asks for tokens past tokenCache, which sets the mark.
	_, isToken := req.Context().Value(tokenRequestKey{}).(bool)
	isToken = isToken || req.Response == nil && !sameOrigin(req.URL, state.url) && !t.c.isOwn(req.URL)
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
		return resp, err
	}
	t.c.replied.Store(true)
	if isToken {
		if err := t.c.admitTokenRedirect(resp); err != nil {
			resp.Body.Close()
			return nil, err
		}
		resp.Body = &tokenBody{resp.Body, req.URL.Host, maxToken}
	} else if resp.StatusCode == http.StatusUnauthorized {
		state.challenged.Store(true)
		t.c.login.offer(chooseChallenge(resp.Header))
	}
	return resp, nil
}

// maxToken bounds the replies of token servers; oras' own bound, which it takes for the end of
// the reply, is above.
const maxToken = 64 << 10

type tokenBody struct {
	io.ReadCloser
	host string
	left int
}

func (b *tokenBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, &longTokenError{b.host}
	}
	return n, err
}

type longTokenError struct{ host string }

func (e *longTokenError) Error() string {
	return fmt.Sprintf("get a token from %s: the reply is longer than %s", e.host, sizeString(maxToken))
}

// debugLine leaves out the query, which may be a signature, and all headers but the range.
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

// tries is what an operation may still do after failures.
type tries struct {
	left   int
	pause  time.Duration
	waited time.Duration // for Retry-After, without progress
}

func (c *client) newTries(n int) *tries { return &tries{left: n, pause: c.pause} }

// next takes a try, and tells how long to pause before it.
func (t *tries) next() time.Duration {
	pause := t.pause
	t.left--
	t.pause *= 2
	return pause/2 + rand.N(pause/2+1)
}

// again waits before the next try after a temporary error; it gives the error back when
// there is none.
func (c *client) again(ctx context.Context, t *tries, err error) error {
	if !isTemporary(err) || isPermanent(err) || errors.Is(err, errToldToWait) || ctx.Err() != nil {
		return err
	}
	if t.left <= 1 {
		return err
	}
	var wait time.Duration
	var asked *retryAfterError
	if errors.As(err, &asked) && asked.after > 0 {
		if t.waited+asked.after > c.options.MaxWait {
			return fmt.Errorf("%w (the registry asks to wait %v)", err, asked.after)
		}
		// A try that was turned away so is none: patience has its own bound, and of many
		// processes that come back together some are turned away again.
		t.waited += asked.after
		wait = asked.after + rand.N(asked.after/8+1)
		if c.options.Notify != nil {
			c.options.Notify(fmt.Sprintf("%s asks to wait %v: %d %s", c.host, asked.after, asked.status, http.StatusText(asked.status)))
		}
	} else {
		wait = t.next()
	}
	return sleep(ctx, wait)
}

// retryAfterError is an error reply that says when to come back.
type retryAfterError struct {
	*statusError
	after time.Duration
}

func (e *retryAfterError) Unwrap() error { return e.statusError }

func retryAfter(h http.Header) time.Duration {
	v := h.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n >= 0 {
		return min(time.Duration(n), 1<<30) * time.Second
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(time.Until(t).Round(time.Second), 0)
	}
	return 0
}

// request is one call of the API.
type request struct {
	method string
	path   string // behind the API's root
	query  url.Values
	header http.Header
	scopes []string // what a token is asked for
	isBlob bool     // a blob is read by its digest
	// url, where set, is asked instead: one that the registry gave. It gets neither the
	// headers configured nor credentials where it is of another origin.
	url *url.URL
	// body, where set, gives size bytes, each time from the start.
	body func() io.Reader
	size int64
}

// do sends the request, again after temporary failures while t allows it. Replies of 400 and
// more are errors. The reply's body ends in errStalled when it stalls.
func (c *client) do(ctx context.Context, r request, t *tries) (*http.Response, error) {
	for {
		resp, err := c.once(ctx, r)
		if err == nil {
			return resp, nil
		}
		if err := c.again(ctx, t, err); err != nil {
			return nil, err
		}
	}
}

func (c *client) once(parent context.Context, r request) (*http.Response, error) {
	if err := c.waitShared(parent); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(parent)
	watch := time.AfterFunc(c.stall, func() { cancel(errStalled) })
	resp, err := c.send(ctx, r, watch)
	watch.Stop()
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp.Body = newStalling(resp.Body, c.stall, cancel, ctx)
	if resp.StatusCode < 400 {
		return resp, nil
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if asked := resp.Request.URL; asked.Scheme == "http" && asked.Host == c.host && isHTTPSHint(resp, b) {
		if !c.guessed {
			return nil, errors.New("the host speaks HTTPS, and was asked in HTTP: by --plain-http, or by its configuration")
		}
		if c.https.Store(true); r.url == nil {
			return c.once(parent, r)
		}
	}
	serr := newStatusError(resp, b)
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		if strings.HasPrefix(resp.Request.Header.Get("Authorization"), "Basic ") && serr.text == "" {
			serr.text = "the credentials for this host are refused"
		}
		if why := c.login.explain(); why != "" && c.isOwn(resp.Request.URL) {
			serr.text = strings.TrimPrefix(serr.text+"; "+why, "; ")
		}
	}
	if after := retryAfter(resp.Header); after > 0 && isTemporary(serr) {
		if c.isOwn(resp.Request.URL) {
			c.postpone(min(after, maxSharedWait))
		}
		return nil, &retryAfterError{serr, after}
	}
	return nil, serr
}

// isHTTPSHint recognises the reply of a TLS server to plain HTTP, and of nothing else: a
// registry names its API version.
func isHTTPSHint(resp *http.Response, body []byte) bool {
	return resp.StatusCode == http.StatusBadRequest &&
		resp.Header.Get("Docker-Distribution-Api-Version") == "" &&
		strings.Contains(strings.ToUpper(string(body)), "HTTPS")
}

func (c *client) send(ctx context.Context, r request, watch *time.Timer) (*http.Response, error) {
	u, foreign := &url.URL{Scheme: c.currentScheme(), Host: c.host, Path: c.path + r.path, RawQuery: r.query.Encode()}, false
	if r.url != nil {
		if foreign = !sameOrigin(u, r.url); foreign {
			u = r.url
		} else {
			own := *r.url
			own.Host = c.host // oras keeps tokens by this spelling
			u = &own
		}
	}
	state := &authState{url: u, isBlob: r.isBlob && r.url == nil}
	ctx = context.WithValue(ctx, authStateKey{}, state)
	ctx = auth.WithScopesForHost(ctx, c.host, r.scopes...)
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), nil)
	if err != nil {
		return nil, errclass.As(err, errdefs.ErrInvalidArgument)
	}
	if r.body != nil {
		req.ContentLength = r.size
		var bodies []*upload
		req.GetBody = func() (io.ReadCloser, error) {
			body := &upload{Reader: r.body(), watch: watch, stall: c.stall, left: r.size}
			bodies = append(bodies, body)
			return body, nil
		}
		// A reply can come before all was read, and net/http read on beside what follows.
		defer func() {
			for _, b := range bodies {
				b.Close()
			}
		}()
		req.Body, _ = req.GetBody()
		if r.size == 0 {
			req.Body = http.NoBody
		}
	}
	if !foreign {
		for name, v := range c.header {
			req.Header[name] = v
		}
	}
	for name, v := range r.header {
		req.Header[name] = v
	}
	req.Header.Set("Accept-Encoding", "identity")
	do := c.http.Do
	if foreign {
		do = c.http.Client.Do
	}
	resp, err := do(req)
	if err != nil {
		if c.wanted.Load() && !c.replied.Load() && isClosed(err) {
			// Since TLS 1.3 the refusal comes, if at all, after the request.
			return nil, errors.New("TLS: the host wants a certificate of its clients, and none is configured")
		}
		var refused *refusedError
		isRefused := errors.As(err, &refused)
		err = classify(ctx, err, state.challenged.Load())
		if why := c.login.explain(); why != "" && (errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err)) && !isRefused {
			err = fmt.Errorf("%w; %s", err, why)
		}
		return nil, err
	}
	if resp.StatusCode == http.StatusUnauthorized && !foreign && req.Header.Get("Authorization") == "" && !state.fetched.Load() && c.isOwn(resp.Request.URL) {
		// A token from before this request was refused, perhaps without a challenge, so that oras did
		// not ask for another. A request without a token gets one.
		if token, ok := strings.CutPrefix(resp.Request.Header.Get("Authorization"), "Bearer "); ok && c.tokens.refuse(token) {
			resp.Body.Close()
			return c.send(ctx, r, watch)
		}
	}
	return resp, nil
}

func (c *client) currentScheme() string {
	if c.https.Load() {
		return "https"
	}
	return c.scheme
}

// upload is the body of a request, which must keep flowing.
type upload struct {
	io.Reader
	watch *time.Timer
	stall time.Duration
	left  int64

	mu     sync.Mutex
	closed bool
}

func (u *upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return 0, os.ErrClosed
	}
	// Not the time of the producer, but of the registry counts.
	u.watch.Stop()
	n, err := u.Reader.Read(p)
	u.left -= int64(n)
	if u.left > 0 {
		u.watch.Reset(u.stall)
	} else {
		u.watch.Reset(commitTimeout)
	}
	if err != nil && err != io.EOF {
		err = &sourceError{err}
	}
	return n, err
}

// Close ends reading: nothing is read from then on.
func (u *upload) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	return nil
}

// sourceError is of what an upload reads, not of the registry.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// stalling is a body whose request is cancelled when no data comes for a while.
type stalling struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	after  time.Duration
}

func newStalling(body io.ReadCloser, after time.Duration, cancel context.CancelCauseFunc, ctx context.Context) *stalling {
	return &stalling{body, ctx, cancel, time.AfterFunc(after, func() { cancel(errStalled) }), after}
}

func (s *stalling) Read(p []byte) (int, error) {
	// The consumer's time does not count.
	s.timer.Reset(s.after)
	n, err := s.ReadCloser.Read(p)
	s.timer.Stop()
	if err != nil && err != io.EOF {
		if context.Cause(s.ctx) != nil {
			err = classify(s.ctx, err, false)
		} else {
			err = errclass.As(err, errdefs.ErrAborted)
		}
	}
	return n, err
}

// within bounds the time that all of the body may take.
func (s *stalling) within(d time.Duration) (stop func() bool) {
	return time.AfterFunc(d, func() {
		s.cancel(errclass.As(fmt.Errorf("the reply did not end within %v", d), context.DeadlineExceeded))
	}).Stop
}

func (s *stalling) Close() error {
	s.timer.Stop()
	s.cancel(nil)
	return s.ReadCloser.Close()
}
