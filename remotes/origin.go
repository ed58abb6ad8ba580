package remotes

import (
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// origin is the scheme, host and port of a URL in one spelling: hosts in lower case, and the port
// always there.
func origin(u *url.URL) string {
	return strings.ToLower(u.Scheme) + "://" + hostPort(u.Scheme, u.Host)
}

// sameOrigin reports whether two URLs have one scheme, host and port.
func sameOrigin(a, b *url.URL) bool { return origin(a) == origin(b) }

// hostPort is a host in lower case with its port, which is that of the scheme where none is written.
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

// isUpgrade reports whether a URL is on the same host as another, by HTTPS instead of HTTP, both on
// their usual ports.
func isUpgrade(from, to *url.URL) bool {
	if from.Scheme != "http" || to.Scheme != "https" {
		return false
	}
	host := hostPort("http", from.Host)
	return strings.HasSuffix(host, ":80") && hostPort("https", to.Host) == strings.TrimSuffix(host, "80")+"443"
}

// realmsOf lists token servers that serve a well-known registry from a name of their own.
var realmsOf = map[string]string{
	"registry-1.docker.io":      "auth.docker.io",
	"docker.elastic.co":         "docker-auth.elastic.co",
	"registry.digitalocean.com": "api.digitalocean.com",
}

// ownsRealm reports whether a token server's name is one of the registry's owner: the registry's
// own, one below it, or a domain that the registry is in. A sibling is not: below azurecr.io or
// jfrog.io there are names of many owners.
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
