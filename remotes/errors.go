package remotes

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unicode"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

func classf(class error, format string, a ...any) error {
	return errclass.Errorf(class, format, a...)
}

// statusError is a reply with an error status.
type statusError struct {
	status    int
	text      string // the registry's message, made safe to print
	class     error
	elsewhere bool // the reply came from another host, after a redirect
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("%d %s", e.status, http.StatusText(e.status))
	if e.text != "" {
		s += ": " + e.text
	}
	return s
}

func (e *statusError) Unwrap() error { return e.class }

// isStatus reports whether an error is a reply with one of the given status codes.
func isStatus(err error, any ...int) bool {
	var e *statusError
	return errors.As(err, &e) && slices.Contains(any, e.status)
}

// isRefusedElsewhere reports whether an error is a refusal by another host to which the registry redirected the
// request. It says nothing about what the registry has: storage refuses HEAD like that if the address is signed for
// GET.
func isRefusedElsewhere(err error) bool {
	var e *statusError
	return errors.As(err, &e) && e.elsewhere && slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden,
		http.StatusMethodNotAllowed, http.StatusNotImplemented}, e.status)
}

// wasRedirected reports whether a reply came from another host than the one that was asked.
func wasRedirected(resp *http.Response) bool {
	first := resp.Request
	for first.Response != nil {
		first = first.Response.Request
	}
	return !sameOrigin(first.URL, resp.Request.URL) && !isUpgrade(first.URL, resp.Request.URL)
}

func classOfStatus(status int) error {
	switch status {
	case http.StatusUnauthorized, http.StatusProxyAuthRequired:
		return errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusTooManyRequests:
		return errdefs.ErrResourceExhausted
	case http.StatusRequestTimeout, http.StatusGatewayTimeout:
		return context.DeadlineExceeded
	case http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, 425, 520, 521, 522, 523, 524:
		return errdefs.ErrAborted
	}
	return nil
}

// maxErrorBody bounds how much of an error reply is read, and maxErrorText how much is shown.
const (
	maxErrorBody = 8 << 10
	maxErrorText = 240
)

// newStatusError parses an error reply of the distribution protocol.
func newStatusError(resp *http.Response, b []byte) *statusError {
	e := &statusError{status: resp.StatusCode, class: classOfStatus(resp.StatusCode), elsewhere: wasRedirected(resp)}
	var body struct {
		Errors []struct {
			Code, Message string
			Detail        json.RawMessage
		} `json:"errors"`
	}
	switch {
	case json.Unmarshal(b, &body) == nil && len(body.Errors) > 0:
		var parts []string
		for _, err := range body.Errors {
			fields := slices.DeleteFunc([]string{err.Code, err.Message, detailText(err.Detail)}, func(s string) bool { return s == "" })
			parts = append(parts, strings.Join(fields, ": "))
		}
		e.text = printable(strings.Join(parts, "; "))
	case strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain"):
		e.text = printable(string(b))
	}
	return e
}

// detailText returns the detail of an error as text: a string unchanged, anything else but an empty value as JSON.
func detailText(detail json.RawMessage) string {
	var text string
	if len(detail) == 0 || json.Unmarshal(detail, &text) == nil {
		return text
	}
	switch compact := string(detail); compact {
	case "{}", "[]", "null":
		return ""
	default:
		return compact
	}
}

// maxWarnings is the largest number of warnings of a registry that are shown.
const maxWarnings = 5

// warnings records the warnings that were shown.
type warnings struct {
	mu    sync.Mutex
	shown []string
}

// warn shows each warning of a reply once (OCI distribution specification, "Warnings": Warning: 299 - "TEXT"). It
// ignores warnings of other hosts to which a redirect led.
func (c *client) warn(resp *http.Response) {
	lines := resp.Header.Values("Warning")
	if len(lines) == 0 || c.options.Notify == nil || !c.isOwn(resp.Request.URL) {
		return
	}
	c.warned.mu.Lock()
	defer c.warned.mu.Unlock()
	for _, line := range lines {
		quoted, ok := strings.CutPrefix(strings.TrimSpace(line), "299 - ")
		text, _, err := parseValue(quoted)
		if text = printable(text); !ok || !strings.HasPrefix(quoted, `"`) || err != nil || text == "" ||
			len(c.warned.shown) == maxWarnings || slices.Contains(c.warned.shown, text) {
			continue
		}
		c.warned.shown = append(c.warned.shown, text)
		c.options.Notify(c.host + " warns: " + text)
	}
}

// printable makes a registry's text safe to print: one line of bounded length without control characters.
func printable(s string) string {
	s = strings.ToValidUTF8(strings.TrimSpace(s), "")
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n == maxErrorText {
			b.WriteString("…")
			break
		}
		switch {
		case unicode.IsSpace(r):
			b.WriteByte(' ')
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			b.WriteByte('?')
		}
		n++
	}
	return b.String()
}

// classify gives a class to the error of a request that got no reply. challenged says that the registry asked for
// authentication before.
func classify(ctx context.Context, err error, challenged bool) error {
	if cerr := context.Cause(ctx); cerr != nil {
		return cerr
	}
	var source *sourceError
	if errors.As(err, &source) {
		return source.error
	}
	var proxy *proxyError
	if errors.As(err, &proxy) {
		return proxy.error
	}
	var refused *refusedError
	if errors.As(err, &refused) {
		return errclass.As(refused, errdefs.ErrUnauthenticated)
	}
	var (
		tokenErr *errcode.ErrorResponse
		badErr   *badTokenError
		urlErr   *url.Error
		dnsErr   *net.DNSError
		netErr   net.Error
		certErr  *tls.CertificateVerificationError
		hostErr  x509.HostnameError
		caErr    x509.UnknownAuthorityError
		alert    *net.OpError // how crypto/tls wraps TLS alerts
		record   tls.RecordHeaderError
	)
	if errors.As(err, &tokenErr) {
		text := ""
		if len(tokenErr.Errors) > 0 {
			text = ": " + printable(tokenErr.Errors.Error())
		}
		class := classOfStatus(tokenErr.StatusCode)
		if class == nil || errdefs.IsNotFound(class) {
			class = errdefs.ErrUnauthenticated
		}
		return classf(class, "get a token from %s: %d %s%s", tokenErr.URL.Host, tokenErr.StatusCode, http.StatusText(tokenErr.StatusCode), text)
	}
	if errors.As(err, &badErr) {
		return errclass.As(badErr, errdefs.ErrUnauthenticated)
	}
	if errors.Is(err, auth.ErrBasicCredentialNotFound) {
		return classf(errdefs.ErrUnauthenticated, "authentication required")
	}
	plain := err
	if errors.As(err, &urlErr) {
		plain = urlErr.Err
	}
	switch {
	case errors.Is(err, errRedirect), errors.Is(err, http.ErrSchemeMismatch):
		if errors.Is(err, http.ErrSchemeMismatch) {
			return fmt.Errorf("the host speaks HTTP, not HTTPS: try --plain-http")
		}
		return plain
	case errors.As(err, &certErr), errors.As(err, &hostErr), errors.As(err, &caErr), errors.As(err, &record),
		errors.As(err, &alert) && (alert.Op == "remote error" || alert.Op == "local error"):
		return fmt.Errorf("TLS: %w", plain)
	case challenged && urlErr != nil && urlErr.Op == "parse": // the address of the token server: that of the registry was parsed before
		return classf(errdefs.ErrUnauthenticated, "malformed address of the token server: %s", printable(plain.Error()))
	case errors.As(err, &dnsErr), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errclass.As(plain, errdefs.ErrAborted)
	case errors.As(err, &netErr) && netErr.Timeout():
		return errclass.As(plain, context.DeadlineExceeded)
	case urlErr != nil:
		if text := plain.Error(); len(text) > maxErrorText {
			plain = errors.New(printable(text)) // may quote a malformed header
		}
		return errclass.As(plain, errdefs.ErrAborted)
	case challenged:
		return errclass.As(errors.New(printable(plain.Error())), errdefs.ErrUnauthenticated)
	}
	return plain
}

// isClosed reports whether the other side closed the connection.
func isClosed(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF)
}
