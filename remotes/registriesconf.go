package remotes

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"distkit/refname"

	"github.com/containerd/errdefs"
)

// RegistryConf is one registry of podman's registries.conf, version 2 (containers-registries.conf(5)).
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

// ParseRegistries reads a registries.conf. It returns the registries and the credential helpers that it names, and ignores its other
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
			return nil, nil, classf(errdefs.ErrInvalidArgument, "registries.conf: registry %d has neither prefix nor location, or that of another one", i+1)
		}
		seen = append(seen, r.Prefix)
	}
	helpers = slices.DeleteFunc(c.Helpers, func(name string) bool { return name == authFilesHelper })
	return c.Registries, helpers, nil
}

// authFilesHelper is the entry of credential-helpers that stands for the auth files.
const authFilesHelper = "containers-auth.json"

// HostsTOML returns the host, as it is in names of images, and its hosts.toml. An insecure location is spoken to in HTTPS
// whose certificate is not verified, or in HTTP if plainHTTP says so: hosts.toml knows no "try both". What hosts.toml can't
// say is an error of class NotImplemented.
func (r RegistryConf) HostsTOML(plainHTTP bool) (host, content string, err error) {
	if strings.ContainsAny(r.Prefix, "/*@") {
		return "", "", classf(errdefs.ErrNotImplemented, "registry %q: hosts.toml is for a whole host, not for a part of it or for several", printable(r.Prefix))
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
			return "", "", classf(errdefs.ErrInvalidArgument, "registry %q: pull-from-mirror is %q", l.Host, printable(m.PullFromMirror))
		}
		server, settings, err := server(m.Location, m.Insecure, plainHTTP)
		if err != nil {
			return "", "", err
		}
		fmt.Fprintf(&b, "\n[host.%q]\ncapabilities = %s\n%s", server, can, settings)
	}
	return l.Host, b.String(), nil
}

// server returns the URL of a location, which can have a path, and the settings that go with it.
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
	if hasPath { // of repositories: the API's root is above it
		url, settings = url+"/v2/"+path, settings+"override_path = true\n"
	}
	return url, settings, nil
}

// HostDirName returns the name of the directory for a host's configuration, as containerd has it.
func HostDirName(host string) string { return hostDirNames(host)[0] }
