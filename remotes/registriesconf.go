package remotes

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"distkit/refname"

	"github.com/containerd/errdefs"
)

// RegistryConf is one registry in podman's registries.conf, version 2 (containers-registries.conf(5)).
type RegistryConf struct {
	Prefix             string       `toml:"prefix"`
	Location           string       `toml:"location"`
	Insecure           bool         `toml:"insecure"`
	Blocked            bool         `toml:"blocked"`
	MirrorByDigestOnly bool         `toml:"mirror-by-digest-only"`
	Mirrors            []mirrorConf `toml:"mirror"`
}

type mirrorConf struct {
	Location       string `toml:"location"`
	Insecure       bool   `toml:"insecure"`
	PullFromMirror string `toml:"pull-from-mirror"`
}

// ParseRegistries parses a registries.conf. It returns its registries and credential helpers, and ignores other
// settings. An unknown key, as in version 1, is an error.
func ParseRegistries(b []byte) (list []RegistryConf, helpers []string, err error) {
	var c struct {
		Registries []RegistryConf    `toml:"registry"`
		Search     []string          `toml:"unqualified-search-registries"`
		Mode       string            `toml:"short-name-mode"`
		Helpers    []string          `toml:"credential-helpers"`
		LayerStore string            `toml:"additional-layer-store-auth-helper"`
		Aliases    map[string]string `toml:"aliases"`
	}
	if err := decodeTOML(b, &c); err != nil {
		return nil, nil, classf(errdefs.ErrInvalidArgument, "registries.conf: %w", err)
	}
	var seen []string
	for i := range c.Registries {
		r := &c.Registries[i]
		r.Prefix = strings.TrimSuffix(cmp.Or(r.Prefix, r.Location), "/")
		if r.Prefix == "" || slices.Contains(seen, r.Prefix) {
			return nil, nil, classf(errdefs.ErrInvalidArgument, "registries.conf: registry %d has no prefix or location, or the same as another one", i+1)
		}
		seen = append(seen, r.Prefix)
	}
	helpers = slices.DeleteFunc(c.Helpers, func(name string) bool { return name == authFilesHelper })
	return c.Registries, helpers, nil
}

// authFilesHelper is the entry in credential-helpers that stands for the credential files.
const authFilesHelper = "containers-auth.json"

// HostsTOML returns the host as it is in image names, and its hosts.toml. For an insecure location, hosts.toml can't
// say "try HTTPS without verification, then HTTP": it gets the first or, with plainHTTP, the second. NotImplemented if
// hosts.toml can't express the registry.
func (r RegistryConf) HostsTOML(plainHTTP bool) (host, content string, err error) {
	if strings.ContainsAny(r.Prefix, "/*@") {
		return "", "", classf(errdefs.ErrNotImplemented, "registry %q: hosts.toml configures exactly one whole host", printable(r.Prefix))
	}
	l, err := ParseLocator(r.Prefix + "/x")
	if err != nil || l.Host == "" {
		return "", "", classf(errdefs.ErrInvalidArgument, "registry %q is not a host", printable(r.Prefix))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# From registries.conf: %s\n", l.Host)
	if r.Blocked {
		b.WriteString("blocked = true\n")
		return l.Host, b.String(), nil
	}
	if location := cmp.Or(r.Location, r.Prefix); location != r.Prefix || r.Insecure {
		server, settings, err := server(location, r.Insecure, plainHTTP)
		if err != nil {
			return "", "", err
		}
		fmt.Fprintf(&b, "server = %q\n%s", server, settings)
	}
	for _, m := range r.Mirrors {
		can := `["pull", "resolve"]`
		switch {
		case m.PullFromMirror == "digest-only" || m.PullFromMirror == "" && r.MirrorByDigestOnly:
			can = `["pull"]`
		case !slices.Contains([]string{"", "all", "tag-only"}, m.PullFromMirror):
			return "", "", classf(errdefs.ErrInvalidArgument, "registry %q: unknown pull-from-mirror %q", l.Host, printable(m.PullFromMirror))
		}
		server, settings, err := server(m.Location, m.Insecure, plainHTTP)
		if err != nil {
			return "", "", err
		}
		fmt.Fprintf(&b, "\n[host.%q]\ncapabilities = %s\n%s", server, can, settings)
	}
	return l.Host, b.String(), nil
}

// server returns the URL of a location, which may have a path, and the settings that it needs.
func server(location string, insecure, plainHTTP bool) (url, settings string, err error) {
	host, path, hasPath := strings.Cut(strings.TrimSuffix(location, "/"), "/")
	l, err := ParseLocator(host + "/x")
	if err != nil || l.Host == "" || hasPath && !refname.IsRepository(path) {
		return "", "", classf(errdefs.ErrInvalidArgument, "location %q is neither HOST nor HOST/PATH", printable(location))
	}
	url = "https://" + l.Host
	if l.Host == dockerHub {
		url = "https://registry-1.docker.io"
	}
	switch {
	case insecure && plainHTTP:
		url = "http://" + l.Host
	case insecure:
		settings = "skip_verify = true\n"
	}
	if hasPath { // the path is that of repositories, below the API's root
		url, settings = url+"/v2/"+path, settings+"override_path = true\n"
	}
	return url, settings, nil
}

// HostDirName returns the name of the directory for a host's configuration, as in containerd.
func HostDirName(host string) string { return hostDirNames(host)[0] }
