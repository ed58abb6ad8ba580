package remotes

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sync/atomic"

	"oras.land/oras-go/v2/registry/remote/auth"
)

type authStateKey struct{}

// authState is what a request's context says of the request, and what became of it.
type authState struct {
	url    *url.URL
	isBlob bool // a blob is read by its digest
	// challenged says that the registry has asked for authentication, fetched that a token was got.
	challenged, fetched atomic.Bool
}

func authStateOf(req *http.Request) *authState {
	if s, ok := req.Context().Value(authStateKey{}).(*authState); ok {
		return s
	}
	return &authState{url: req.URL}
}

// tokenRequestKey marks the context of requests for a token. Its value is whether they may have
// the credential.
type tokenRequestKey struct{}

// credential is oras' question for what to authenticate with.
func (c *client) credential(ctx context.Context, _ string) (auth.Credential, error) {
	if allowed, ok := ctx.Value(tokenRequestKey{}).(bool); ok && !allowed {
		return auth.EmptyCredential, nil
	}
	return c.login.credential(ctx)
}

// isOwn reports whether a URL is of the registry's own origin, or of the same host with TLS.
func (c *client) isOwn(u *url.URL) bool {
	own := &url.URL{Scheme: c.currentScheme(), Host: c.host}
	return sameOrigin(own, u) || isUpgrade(own, u)
}

// refusedError is of a request that was not sent, since it would have had a secret for somebody whom
// it is not for, or of a token server that is not asked.
type refusedError struct {
	origin string // the token server
	reason string
}

func (e *refusedError) Error() string { return e.reason }

// admit is the last check before a request leaves, redirects and requests for tokens included.
// Authorization, cookies, configured headers and the forms of token requests go to the registry's own
// origin alone, and what is for token servers also to those of the registry's owner (ownsRealm) and
// those that hosts.toml names. From TLS to clear text goes nothing but the reading of a blob by its
// digest.
func (c *client) admit(req *http.Request, isToken bool) error {
	hasSecret, to := c.hasSecret(req), printable(origin(req.URL))
	if c.isOwn(req.URL) {
		return nil
	}
	if !isToken && c.currentScheme() == "https" && req.URL.Scheme != "https" && (hasBody(req) || !authStateOf(req).isBlob) {
		return &refusedError{reason: "the registry has TLS, and " + to + " has none"}
	}
	if !hasSecret && !isToken {
		return nil
	}
	if !isToken {
		return &refusedError{reason: "credentials would have gone to " + to}
	}
	if c.currentScheme() == "https" && req.URL.Scheme != "https" {
		return &refusedError{reason: "the token server " + to + " has no TLS, as the registry has"}
	}
	host := req.URL.Hostname()
	if slices.ContainsFunc(c.realms, func(u *url.URL) bool { return sameOrigin(u, req.URL) }) || ownsRealm(c.hostname(), host) {
		return nil
	}
	if c.isBlockedRealm(req.Context(), host) {
		return &refusedError{reason: "the token server " + to + " is at an address of this machine or network alone: " + nameRealm(to)}
	}
	if hasSecret {
		return &refusedError{to, "credentials were not sent to the token server: " + nameRealm(to)}
	}
	return nil
}

// admitTokenRedirect refuses what oras would, as an error that no other try cures.
func (c *client) admitTokenRedirect(resp *http.Response) error {
	to, err := resp.Location()
	if err != nil || resp.StatusCode < 300 || resp.StatusCode > 399 {
		return nil
	}
	from, keepsBody := printable(origin(resp.Request.URL)), resp.StatusCode == http.StatusTemporaryRedirect || resp.StatusCode == http.StatusPermanentRedirect
	switch {
	case c.currentScheme() == "https" && to.Scheme != "https":
		return &refusedError{reason: "the token server " + from + " redirects to " + printable(origin(to)) + ", which has no TLS"}
	case keepsBody && resp.Request.Body != nil && !sameOrigin(resp.Request.URL, to):
		return &refusedError{reason: "the token server " + from + " redirects a request with credentials to " + printable(origin(to))}
	}
	return nil
}

func (c *client) hostname() string { return (&url.URL{Host: c.host}).Hostname() }

// hasSecret reports whether a request has something of ours that not everybody may have.
func (c *client) hasSecret(req *http.Request) bool {
	for name, values := range req.Header {
		switch {
		case slices.Contains(keptHeaders, name):
		case name == "Authorization":
			user, password, _ := req.BasicAuth()
			theirs, _ := req.URL.User.Password()
			if req.URL.User == nil || user != req.URL.User.Username() || password != theirs {
				return true // and not what net/http takes from the address itself
			}
		case name == "Cookie", c.header[name] != nil && slices.Equal(values, c.header[name]):
			return true
		}
	}
	isForm := req.Header.Get("Content-Type") == "application/x-www-form-urlencoded"
	return isForm && hasBody(req)
}

func hasBody(req *http.Request) bool { return req.Body != nil && req.ContentLength != 0 }

// isBlockedRealm reports whether a token server is at an address that no registry elsewhere may send
// its clients to: loopback, link-local, and where clouds tell secrets to their machines. A registry on
// this machine may name token servers on it. A name that can't be looked up is for a proxy to look up.
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

// lookupHost gives the addresses of a host, as IPv4 where they stand for one.
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

// Prefixes of IPv6 addresses that stand for an IPv4 address (RFC 6052, RFC 3056).
var (
	nat64     = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour = netip.MustParsePrefix("2002::/16")
)
