package remotes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// request is one call of the distribution API.
type request struct {
	method string
	path   string // below the API's root
	query  url.Values
	header http.Header
	scopes []string // for the token
	isBlob bool     // reads a blob by its digest
	// url, if not nil, replaces the address. It comes from the registry or a manifest. If it has another origin, no
	// configured headers or credentials are sent.
	url *url.URL
	// body, if not nil, returns a new reader of size bytes for each try.
	body func() io.Reader
	size int64
}

// do sends a request, and repeats it after temporary failures as far as t allows.
func (c *client) do(ctx context.Context, r request, t *tries) (resp *http.Response, err error) {
	err = c.retry(ctx, t, func() (err error) {
		resp, err = c.once(ctx, r)
		return err
	})
	return resp, err
}

// once sends a request a single time. A reply with status 300 or more is an error. Reading the body fails with a
// stallError if it stalls.
func (c *client) once(parent context.Context, r request) (*http.Response, error) {
	if err := c.waitShared(parent); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(parent)
	dog := newWatchdog(cancel)
	dog.start(c.timeout)
	resp, err := c.send(ctx, r, dog)
	dog.stop()
	if err != nil {
		cancel(nil)
		return nil, err
	}
	resp.Body = &guardedBody{resp.Body, ctx, dog, c.stall}
	c.warn(resp)
	err = c.judge(resp, r)
	if err == nil {
		return resp, nil
	}
	resp.Body.Close()
	if err == errUseHTTPS {
		return c.once(parent, r)
	}
	return nil, err
}

// errUseHTTPS reports that HTTP was a wrong guess, and the request must be sent again.
var errUseHTTPS = errors.New("the host speaks HTTPS")

// judge returns the error that a reply means, or nil. It is the single place that decides what a reply means, for all
// kinds of requests. Redirects and challenges were handled before (see roundTripper). If judge fails, firstHost goes on
// to the next host, and retry waits as a retryAfterError says.
func (c *client) judge(resp *http.Response, r request) error {
	if resp.Request.Method != r.method {
		// A redirect by 301, 302 or 303 turns a request that changes something into a GET.
		return fmt.Errorf("%w: %s became %s at %s", errRedirect, r.method, resp.Request.Method, printable(origin(resp.Request.URL)))
	}
	if resp.StatusCode < 300 {
		return nil
	}
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	if asked := resp.Request.URL; asked.Scheme == "http" && asked.Host == c.host && isHTTPSHint(resp, b) {
		if !c.guessed {
			return errors.New("the host speaks HTTPS, and was asked in HTTP: by --plain-http, or by its configuration")
		}
		if c.https.Store(true); r.url == nil {
			return errUseHTTPS
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
		// A Retry-After of a redirect's target applies to that host only.
		if c.isOwn(resp.Request.URL) {
			c.postpone(min(after, maxSharedWait))
		}
		return &retryAfterError{serr, after}
	}
	return serr
}

// isHTTPSHint recognises the reply of a TLS server to plain HTTP. A reply of a registry names its API version.
func isHTTPSHint(resp *http.Response, body []byte) bool {
	return resp.StatusCode == http.StatusBadRequest &&
		resp.Header.Get("Docker-Distribution-Api-Version") == "" &&
		strings.Contains(strings.ToUpper(string(body)), "HTTPS")
}

func (c *client) send(ctx context.Context, r request, dog *watchdog) (*http.Response, error) {
	u, foreign := &url.URL{Scheme: c.currentScheme(), Host: c.host, Path: c.path + r.path, RawQuery: r.query.Encode()}, false
	if r.url != nil {
		if foreign = !sameOrigin(u, r.url); foreign {
			u = r.url
		} else {
			own := *r.url
			own.Host = c.host // oras keys tokens by this spelling
			u = &own
		}
	}
	state := &authState{url: u, isBlob: r.isBlob}
	ctx = context.WithValue(ctx, authStateKey{}, state)
	ctx = auth.WithScopesForHost(ctx, c.host, r.scopes...)
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), nil)
	if err != nil {
		return nil, errclass.As(err, errdefs.ErrInvalidArgument)
	}
	if r.body != nil {
		req.ContentLength = r.size
		var bodies []*upload
		// The server may reply while net/http still reads the body: Close ends that.
		stop := func() {
			for _, b := range bodies {
				b.Close()
			}
		}
		defer stop()
		req.GetBody = func() (io.ReadCloser, error) {
			stop() // two readers of one content must not be read at the same time
			body := &upload{Reader: r.body(), dog: dog, stall: c.stall, commit: max(commitTimeout, c.timeout), left: r.size}
			bodies = append(bodies, body)
			return body, nil
		}
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
			// Since TLS 1.3 a server refuses a missing certificate only after the request, if it says so at all.
			return nil, errors.New("TLS: the host wants a client certificate, and none is configured")
		}
		var refused *refusedError
		isRefused := errors.As(err, &refused)
		err = classify(ctx, err, state.challenged.Load())
		if why := c.login.explain(); why != "" && (errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err)) && !isRefused {
			err = fmt.Errorf("%w; %s", err, why)
		}
		if state.unanswered.Load() && isTemporary(err) {
			err = &noReplyError{err}
		}
		return nil, err
	}
	if resp.StatusCode == http.StatusUnauthorized && !foreign && req.Header.Get("Authorization") == "" && !state.fetched.Load() && c.isOwn(resp.Request.URL) {
		// An old token was refused, possibly without a challenge, so that oras didn't ask for a new one. Sending the
		// request without a token makes it do so.
		if token, ok := strings.CutPrefix(resp.Request.Header.Get("Authorization"), "Bearer "); ok && c.tokens.refuse(token) {
			resp.Body.Close()
			return c.send(ctx, r, dog)
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

// noReplyError reports that a host could not be reached or did not reply in time.
type noReplyError struct{ error }

func (e *noReplyError) Unwrap() error { return e.error }

// stallError reports that no data came for a while.
type stallError struct{ after time.Duration }

func (e *stallError) Error() string { return fmt.Sprintf("no data came for %v", e.after) }

func (e *stallError) Unwrap() error { return context.DeadlineExceeded }

// watchdog cancels a request when nothing moves for a while.
type watchdog struct {
	cancel context.CancelCauseFunc
	timer  *time.Timer
	after  atomic.Int64 // nanoseconds
}

func newWatchdog(cancel context.CancelCauseFunc) *watchdog {
	d := &watchdog{cancel: cancel}
	d.timer = time.AfterFunc(time.Hour, func() { cancel(&stallError{time.Duration(d.after.Load())}) })
	return d
}

func (d *watchdog) start(after time.Duration) {
	d.after.Store(int64(after))
	d.timer.Reset(after)
}

func (d *watchdog) stop() { d.timer.Stop() }

// upload is the body of a request. It is guarded by a watchdog.
type upload struct {
	io.Reader
	dog    *watchdog
	stall  time.Duration
	commit time.Duration // how long the registry may take after it has received everything
	left   int64

	mu     sync.Mutex
	closed bool
}

func (u *upload) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return 0, os.ErrClosed
	}
	// Only the registry's time counts, not that of the source.
	u.dog.stop()
	n, err := u.Reader.Read(p)
	if u.left -= int64(n); u.left > 0 {
		u.dog.start(u.stall)
	} else {
		u.dog.start(u.commit)
	}
	if err != nil && err != io.EOF {
		err = &sourceError{err}
	}
	return n, err
}

// Close makes further reads fail.
func (u *upload) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	return nil
}

// sourceError is an error of the source of an upload, not of the registry.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// guardedBody is the body of a reply. Its watchdog cancels the request when no data comes for a while.
type guardedBody struct {
	io.ReadCloser
	ctx   context.Context
	dog   *watchdog
	stall time.Duration
}

func (b *guardedBody) Read(p []byte) (int, error) {
	// Only the registry's time counts, not that of the reader.
	b.dog.start(b.stall)
	n, err := b.ReadCloser.Read(p)
	b.dog.stop()
	if err != nil && err != io.EOF {
		if context.Cause(b.ctx) != nil {
			err = classify(b.ctx, err, false)
		} else {
			err = errclass.As(err, errdefs.ErrAborted)
		}
	}
	return n, err
}

// limit bounds the total time for the body.
func (b *guardedBody) limit(d time.Duration) (stop func() bool) {
	return time.AfterFunc(d, func() {
		b.dog.cancel(errclass.As(fmt.Errorf("the reply did not end within %v", d), context.DeadlineExceeded))
	}).Stop
}

func (b *guardedBody) Close() error {
	b.dog.stop()
	b.dog.cancel(nil)
	return b.ReadCloser.Close()
}
