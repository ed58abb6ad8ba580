package remotes

import (
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"unicode"

	"golang.org/x/net/publicsuffix"
)

// origin returns the scheme, host and port of a URL in canonical form: in lower case, with the port.
func origin(u *url.URL) string {
	return strings.ToLower(u.Scheme) + "://" + hostPort(u.Scheme, u.Host)
}

// sameOrigin reports whether two URLs have the same scheme, host and port.
func sameOrigin(a, b *url.URL) bool { return origin(a) == origin(b) }

// hostPort returns a host in lower case with its port, by default that of the scheme.
func hostPort(scheme, host string) string {
	u := url.URL{Host: host}
	port := u.Port()
	if port == "" {
		port = "443"
		if strings.EqualFold(scheme, "http") {
			port = "80"
		}
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// isUpgrade reports whether to is on the same host as from, with HTTPS instead of HTTP, both on their default ports.
func isUpgrade(from, to *url.URL) bool {
	if from.Scheme != "http" || to.Scheme != "https" {
		return false
	}
	host := hostPort("http", from.Host)
	return strings.HasSuffix(host, ":80") && hostPort("https", to.Host) == strings.TrimSuffix(host, "80")+"443"
}

// ownsRealm reports whether a token server belongs to the owner of the registry, judged by its name: it is the
// registry's own name, or both have the same registered domain, as registry.example.com and gitlab.example.com do.
func ownsRealm(registry, realm string) bool {
	registry, realm = strings.ToLower(registry), strings.ToLower(realm)
	if realm == "" {
		return false
	}
	if registry == realm || isThisMachine(registry) && isThisMachine(realm) {
		return true
	}
	domain := registeredDomain(registry)
	if domain == "" || domain != registeredDomain(realm) {
		return false
	}
	isShared := slices.ContainsFunc(sharedDomains, func(s string) bool { return domain == s || strings.HasSuffix(domain, "."+s) })
	return !isShared || strings.HasSuffix(realm, "."+registry) || strings.HasSuffix(registry, "."+realm)
}

// sharedDomains have subdomains of many owners, but are not in the public suffix list. A registry and a token server
// below one of them must be below each other.
var sharedDomains = []string{"amazonaws.com", "azure.com", "azurecr.io", "jfrog.io", "nip.io", "sslip.io"}

// registeredDomain returns the registered part of a name according to the public suffix list. It is "" for an address,
// a name with a single label, a public suffix, and a name that isn't ASCII.
func registeredDomain(host string) string {
	if isAddress(host) || strings.ContainsFunc(host, func(r rune) bool { return r > unicode.MaxASCII }) {
		return ""
	}
	domain, err := publicsuffix.EffectiveTLDPlusOne(host)
	if err != nil {
		return ""
	}
	return domain
}

// isThisMachine reports whether a host can only be this machine (RFC 6761).
func isThisMachine(host string) bool {
	return isLoopback(host) || strings.HasSuffix(host, ".localhost")
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}
