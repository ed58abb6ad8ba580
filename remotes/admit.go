package remotes

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"oras.land/oras-go/v2/registry/remote/auth"
)

type authStateKey struct{}

// authState is the authentication state of a request. It is in the request's context, and in those of its redirects and
// token requests.
type authState struct {
	url    *url.URL
	isBlob bool // reads a blob by its digest
	// challenged: the registry replied 401. fetched: a token was requested since. unanswered: the registry itself did
	// not reply.
	challenged, fetched, unanswered atomic.Bool
}

func authStateOf(req *http.Request) *authState {
	if s, ok := req.Context().Value(authStateKey{}).(*authState); ok {
		return s
	}
	return &authState{url: req.URL}
}

// tokenRequestKey marks the context of a token request. Its value says whether the request may carry the credential.
type tokenRequestKey struct{}

// credential returns the credential for oras to authenticate with.
func (c *client) credential(ctx context.Context, _ string) (auth.Credential, error) {
	if allowed, ok := ctx.Value(tokenRequestKey{}).(bool); ok && !allowed {
		return auth.EmptyCredential, nil
	}
	return c.login.credential(ctx)
}

// isOwn reports whether a URL has the registry's own origin, or the same host with TLS.
func (c *client) isOwn(u *url.URL) bool {
	own := &url.URL{Scheme: c.currentScheme(), Host: c.host}
	return sameOrigin(own, u) || isUpgrade(own, u)
}

// refusedError is the error of a request that was not sent, because it would have taken a secret to another origin, or
// because its token server must not be contacted.
type refusedError struct {
	origin string // the token server, if it may be contacted without the credential
	reason string
}

func (e *refusedError) Error() string { return e.reason }

// admit is the last check before a request is sent, including redirects and token requests.
//
// Authorization, cookies, configured headers and token forms may go to the registry's own origin. A token request may
// also take the credential to a token server of the registry's owner (ownsRealm), or to one that hosts.toml lists. If
// the registry uses TLS, only a read of a blob by its digest may go without TLS.
func (c *client) admit(req *http.Request, isToken bool) error {
	hasSecret, to := c.hasSecret(req), printable(origin(req.URL))
	if c.isOwn(req.URL) {
		return nil
	}
	if !isToken && c.currentScheme() == "https" && req.URL.Scheme != "https" && (hasBody(req) || !authStateOf(req).isBlob) {
		return &refusedError{reason: "the registry uses TLS, but " + to + " doesn't"}
	}
	if !hasSecret && !isToken {
		return nil
	}
	if !isToken {
		return &refusedError{reason: "credentials would have gone to " + to}
	}
	if req.URL.Scheme != "http" && req.URL.Scheme != "https" || req.URL.Host == "" {
		return &refusedError{reason: "the token server's address is not an HTTP URL: " + strconv.Quote(printable(req.URL.String()))}
	}
	if c.currentScheme() == "https" && req.URL.Scheme != "https" {
		return &refusedError{reason: "the token server " + to + " doesn't use TLS, but the registry does"}
	}
	if slices.ContainsFunc(c.realms, func(u *url.URL) bool { return sameOrigin(u, req.URL) }) {
		return nil
	}
	host := req.URL.Hostname()
	owned := ownsRealm(c.hostname(), host)
	if isKnown := owned && (strings.EqualFold(host, c.hostname()) || c.isProxied(req)); !isKnown && c.isBlockedRealm(req.Context(), host) {
		return &refusedError{reason: "the token server " + to + " is at a loopback or link-local address: " + nameRealm(to)}
	}
	if owned {
		return nil
	}
	if hasSecret {
		return &refusedError{to, "credentials were not sent to the token server: " + nameRealm(to)}
	}
	return nil
}

// admitTokenRedirect refuses a token server's redirect that oras would refuse: its error looks like a network failure,
// which would be retried.
func (c *client) admitTokenRedirect(resp *http.Response) error {
	to, err := resp.Location()
	if err != nil || resp.StatusCode < 300 || resp.StatusCode > 399 {
		return nil
	}
	from, keepsBody := printable(origin(resp.Request.URL)), resp.StatusCode == http.StatusTemporaryRedirect || resp.StatusCode == http.StatusPermanentRedirect
	switch {
	case to.Scheme != "http" && to.Scheme != "https":
		return &refusedError{reason: "the token server " + from + " redirects to scheme " + printable(to.Scheme)}
	case c.currentScheme() == "https" && to.Scheme != "https":
		return &refusedError{reason: "the token server " + from + " redirects to " + printable(origin(to)) + ", which doesn't use TLS"}
	case keepsBody && resp.Request.Body != nil && !sameOrigin(resp.Request.URL, to):
		return &refusedError{reason: "the token server " + from + " redirects a request with credentials to " + printable(origin(to))}
	}
	return nil
}

// isProxied reports whether a proxy resolves the host of a request.
func (c *client) isProxied(req *http.Request) bool {
	u, err := c.proxyFor(req)
	return u != nil && err == nil
}

func (c *client) hostname() string { return (&url.URL{Host: c.host}).Hostname() }

// hasSecret reports whether a request carries a credential, a cookie or a configured header.
func (c *client) hasSecret(req *http.Request) bool {
	for name, values := range req.Header {
		switch {
		case slices.Contains(keptHeaders, name):
		case name == "Authorization":
			user, password, _ := req.BasicAuth()
			theirs, _ := req.URL.User.Password()
			if req.URL.User == nil || user != req.URL.User.Username() || password != theirs {
				return true // not ours: net/http adds the credentials in a URL itself
			}
		case name == "Cookie", c.header[name] != nil && slices.Equal(values, c.header[name]):
			return true
		}
	}
	isForm := req.Header.Get("Content-Type") == "application/x-www-form-urlencoded"
	return isForm && hasBody(req)
}

func hasBody(req *http.Request) bool { return req.Body != nil && req.ContentLength != 0 }

// isBlockedRealm reports whether a token server has a loopback or link-local address, or that of a cloud's metadata
// service. Otherwise a registry could make us contact such a service, and send its reply as a token. A registry on this
// machine may use loopback addresses. A name that doesn't resolve here is not blocked, because a proxy may resolve it.
func (c *client) isBlockedRealm(ctx context.Context, host string) bool {
	blocked := auth.DefaultBlockedRealmPrefixes()
	for _, a := range lookupHost(ctx, host) {
		if a.IsLoopback() && slices.ContainsFunc(lookupHost(ctx, c.hostname()), netip.Addr.IsLoopback) {
			continue
		}
		if slices.ContainsFunc(blocked, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return true
		}
	}
	return false
}

var lookupNetIP = net.DefaultResolver.LookupNetIP

// lookupHost resolves a host. An IPv6 address that embeds an IPv4 address is returned as the latter.
func lookupHost(ctx context.Context, host string) []netip.Addr {
	list := []netip.Addr{}
	if a, err := netip.ParseAddr(host); err == nil {
		list = append(list, a)
	} else {
		list, _ = lookupNetIP(ctx, "ip", host)
	}
	for i, a := range list {
		a = a.Unmap().WithZone("")
		if b := a.As16(); nat64.Contains(a) {
			a = netip.AddrFrom4([4]byte(b[12:]))
		} else if sixToFour.Contains(a) {
			a = netip.AddrFrom4([4]byte(b[2:]))
		}
		list[i] = a
	}
	return list
}

// Prefixes of IPv6 addresses that embed an IPv4 address (RFC 6052, RFC 3056).
var (
	nat64     = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour = netip.MustParsePrefix("2002::/16")
)
