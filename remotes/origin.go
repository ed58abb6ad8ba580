package remotes

import (
	"net"
	"net/netip"
	"net/url"
	"strings"
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

// isUpgrade reports whether to is on the host of from, with HTTPS instead of HTTP, both on their
// default ports.
func isUpgrade(from, to *url.URL) bool {
	if from.Scheme != "http" || to.Scheme != "https" {
		return false
	}
	host := hostPort("http", from.Host)
	return strings.HasSuffix(host, ":80") && hostPort("https", to.Host) == strings.TrimSuffix(host, "80")+"443"
}

// realmsOf lists well-known registries whose token server has another name of the same owner.
var realmsOf = map[string]string{
	"registry-1.docker.io":        "auth.docker.io",
	"docker.elastic.co":           "docker-auth.elastic.co",
	"registry.digitalocean.com":   "api.digitalocean.com",
	"registry.connect.redhat.com": "sso.redhat.com",
	"registry.suse.com":           "scc.suse.com",
}

// ownsRealm reports whether the name of a token server shows that it has the registry's owner: it is
// the registry's own name, one below it, or a domain above it. A sibling shows nothing: the names below
// azurecr.io or jfrog.io have many owners.
func ownsRealm(registry, realm string) bool {
	registry, realm = strings.ToLower(registry), strings.ToLower(realm)
	if realm == "" {
		return false
	}
	if registry == realm || realmsOf[registry] == realm || isLoopback(registry) && isLoopback(realm) {
		return true
	}
	if isAddress(registry) || isAddress(realm) {
		return false
	}
	return strings.HasSuffix(realm, "."+registry) || strings.Contains(realm, ".") && strings.HasSuffix(registry, "."+realm)
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}
