package remotes

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// capability is what a host may be asked for.
type capability uint8

const (
	canPull capability = 1 << iota
	canResolve
	canPush
	canAll = canPull | canResolve | canPush
)

// endpoint is one host that serves a registry's names, in containerd's terms.
type endpoint struct {
	scheme, host, path string // path is the API's root, /v2
	capabilities       capability
	header             http.Header
	tls                *tls.Config // nil: the default
	dialTimeout        time.Duration
	guessed            bool       // the scheme is a guess: HTTP, since the host is this machine
	realms             []*url.URL // token servers that may have the credentials
}

// endpoints are the hosts to ask, in order, for names of the registry: those that the hosts
// directories configure, else the registry itself.
func endpoints(registry string, o Options) ([]endpoint, error) {
	roots := o.HostsDir
	if roots == "" {
		roots = DefaultHostsDir
	}
	dir, err := hostDir(roots, registry)
	if err != nil {
		return nil, err
	}
	list := []endpoint{{capabilities: canAll}}
	if dir != "" {
		if list, err = readHostDir(dir); err != nil {
			return nil, err
		}
	}
	if last := &list[len(list)-1]; last.host == "" {
		last.scheme, last.host, last.path = "https", registry, "/v2"
		switch {
		case registry == "docker.io":
			last.host = "registry-1.docker.io"
		case o.PlainHTTP:
			last.scheme = "http"
		case isLoopback(registry) && last.tls == nil:
			if _, port, err := net.SplitHostPort(registry); err == nil && port != "443" {
				last.scheme, last.guessed = "http", true
			}
		}
	}
	return list, nil
}

// hostHelper is the helper that a host's configuration names, and what it is to be told: the
// server, with the repository behind it.
func hostHelper(l Locator, o Options) (name, address string, err error) {
	dir, err := hostDir(cmp.Or(o.HostsDir, DefaultHostsDir), l.Host)
	if err != nil || dir == "" {
		return "", "", err
	}
	file := filepath.Join(dir, "hosts.toml")
	b, err := os.ReadFile(file)
	if err != nil {
		return "", "", nil // whoever reads the rest of it tells
	}
	var c struct {
		Helper string `toml:"helper"`
		Server string `toml:"server"`
	}
	if toml.Unmarshal(b, &c) != nil || c.Helper == "" {
		return "", "", nil
	}
	if !isHelperName(c.Helper) || c.Server == "" || c.Server[0] == '-' {
		return "", "", classf(errdefs.ErrInvalidArgument, "%s: helper %q wants a name of a-z, 0-9 and -, and a server", file, c.Helper)
	}
	return c.Helper, strings.TrimSuffix(c.Server, "/") + "/" + l.Name, nil
}

func isLoopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// hostDir finds the directory of a host as containerd does: HOST_PORT_, HOST:PORT, _default.
func hostDir(roots, host string) (string, error) {
	names := []string{host, "_default"}
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		names = []string{host[:i] + "_" + host[i+1:] + "_", host, "_default"}
	}
	for _, root := range filepath.SplitList(roots) {
		for _, name := range names {
			dir := filepath.Join(root, name)
			switch _, err := os.Stat(dir); {
			case err == nil:
				return dir, nil
			case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission):
				return "", fmt.Errorf("find configuration of %s: %w", host, err)
			}
		}
	}
	return "", nil
}

// hostFile is one table of hosts.toml.
type hostFile struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`     // "file", ["file", …]
	Client       any            `toml:"client"` // "file", ["file", …], [["cert", "key"], …]
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"` // "value", ["value", …]
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
	Realm        any            `toml:"realm"` // "URL", ["URL", …]
}

// readHostDir reads hosts.toml, else the certificates in the manner of docker's certs.d. The
// last endpoint has no host where the file names no server.
func readHostDir(dir string) ([]endpoint, error) {
	file := filepath.Join(dir, "hosts.toml")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(bytes.TrimSpace(b)) == 0 {
		return readCertDir(dir)
	}
	if err != nil {
		return nil, err
	}
	list, err := parseHosts(dir, b)
	if err != nil {
		return nil, classf(errdefs.ErrInvalidArgument, "%s: %w", file, err)
	}
	return list, nil
}

func parseHosts(dir string, b []byte) ([]endpoint, error) {
	var c struct {
		hostFile
		Server string              `toml:"server"`
		Hosts  map[string]hostFile `toml:"host"`
	}
	if err := toml.Unmarshal(b, &c); err != nil {
		return nil, errors.New(printable(err.Error()))
	}
	var list []endpoint
	for _, name := range hostOrder(b) {
		e, err := newEndpoint(dir, name, c.Hosts[name])
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	e, err := newEndpoint(dir, c.Server, c.hostFile)
	if err != nil {
		return nil, err
	}
	return append(list, e), nil
}

// hostOrder lists the [host."…"] tables in the order of the file, which a map forgets.
func hostOrder(b []byte) []string {
	var order []string
	seen := map[string]bool{}
	p := unstable.Parser{}
	p.Reset(b)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind != unstable.Table {
			continue
		}
		var key []string
		for it := e.Key(); it.Next(); {
			key = append(key, string(it.Node().Data))
		}
		if len(key) >= 2 && key[0] == "host" && !seen[key[1]] {
			seen[key[1]] = true
			order = append(order, key[1])
		}
	}
	return order
}

func newEndpoint(dir, server string, c hostFile) (endpoint, error) {
	e := endpoint{}
	if server != "" {
		if !strings.HasPrefix(server, "http://") && !strings.HasPrefix(server, "https://") {
			server = "https://" + server
		}
		u, err := url.Parse(server)
		if err != nil || u.Host == "" {
			return e, fmt.Errorf("server %q is not a URL", server)
		}
		e.scheme, e.host = u.Scheme, u.Host
		if u.Path != "" {
			e.path = strings.TrimSuffix(path.Clean(u.Path), "/")
		}
		if !c.OverridePath && !strings.HasSuffix(e.path, "/v2") {
			e.path += "/v2"
		}
	}
	for _, s := range c.Capabilities {
		switch strings.ToLower(s) {
		case "pull":
			e.capabilities |= canPull
		case "resolve":
			e.capabilities |= canResolve
		case "push":
			e.capabilities |= canPush
		default:
			return e, fmt.Errorf("unknown capability %q", s)
		}
	}
	if len(c.Capabilities) == 0 {
		e.capabilities = canAll
	}
	for name, value := range c.Header {
		values, err := stringList(value)
		if err != nil {
			return e, fmt.Errorf("header %s: %w", name, err)
		}
		if e.header == nil {
			e.header = http.Header{}
		}
		for _, v := range values {
			e.header.Add(name, v)
		}
	}
	if c.DialTimeout != "" {
		d, err := time.ParseDuration(c.DialTimeout)
		if err != nil {
			return e, fmt.Errorf("dial_timeout: %w", err)
		}
		e.dialTimeout = d
	}
	realms, err := stringList(c.Realm)
	if err != nil {
		return e, fmt.Errorf("realm: %w", err)
	}
	for _, realm := range realms {
		u, err := url.Parse(realm)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
			return e, fmt.Errorf("realm %q is not a URL of a token server: write https://HOST[:PORT]", realm)
		}
		e.realms = append(e.realms, u)
	}
	cas, err := stringList(c.CA)
	if err != nil {
		return e, fmt.Errorf("ca: %w", err)
	}
	pairs, err := clientPairs(c.Client)
	if err != nil {
		return e, fmt.Errorf("client: %w", err)
	}
	e.tls, err = newTLS(dir, cas, pairs, c.SkipVerify)
	return e, err
}

func stringList(v any) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{v}, nil
	case []any:
		var list []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%v is not a string", e)
			}
			list = append(list, s)
		}
		return list, nil
	}
	return nil, fmt.Errorf("%v is neither a string nor a list of them", v)
}

// clientPairs reads certificates with their keys; one file may hold both.
func clientPairs(v any) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	var pairs [][2]string
	for _, e := range list {
		files, err := stringList(e)
		switch {
		case err != nil:
			return nil, err
		case len(files) == 0:
		case len(files) == 1:
			pairs = append(pairs, [2]string{files[0], files[0]})
		case len(files) == 2:
			pairs = append(pairs, [2]string{files[0], files[1]})
		default:
			return nil, fmt.Errorf("%v is not a pair of certificate and key", files)
		}
	}
	return pairs, nil
}

// newTLS is nil where nothing differs from the default.
func newTLS(dir string, cas []string, pairs [][2]string, skipVerify *bool) (*tls.Config, error) {
	if len(cas) == 0 && len(pairs) == 0 && skipVerify == nil {
		return nil, nil
	}
	abs := func(file string) string {
		if filepath.IsAbs(file) {
			return file
		}
		return filepath.Join(dir, file)
	}
	c := &tls.Config{}
	if skipVerify != nil {
		c.InsecureSkipVerify = *skipVerify
	}
	if len(cas) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		for _, file := range cas {
			b, err := os.ReadFile(abs(file))
			if err != nil {
				return nil, fmt.Errorf("ca: %w", err)
			}
			if !pool.AppendCertsFromPEM(b) {
				return nil, fmt.Errorf("ca: %s holds no certificate", abs(file))
			}
		}
		c.RootCAs = pool
	}
	for _, p := range pairs {
		cert, err := tls.LoadX509KeyPair(abs(p[0]), abs(p[1]))
		if err != nil {
			return nil, fmt.Errorf("client: %w", err)
		}
		c.Certificates = append(c.Certificates, cert)
	}
	return c, nil
}

// readCertDir reads *.crt as authorities and *.cert with *.key as client certificates.
func readCertDir(dir string) ([]endpoint, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var cas []string
	var pairs [][2]string
	for _, f := range files {
		name := f.Name()
		switch filepath.Ext(name) {
		case ".crt":
			cas = append(cas, name)
		case ".cert":
			key := strings.TrimSuffix(name, ".cert") + ".key"
			if _, err := os.Stat(filepath.Join(dir, key)); err != nil {
				key = name
			}
			pairs = append(pairs, [2]string{name, key})
		}
	}
	c, err := newTLS(dir, cas, pairs, nil)
	if err != nil {
		return nil, classf(errdefs.ErrInvalidArgument, "%s: %w", dir, err)
	}
	return []endpoint{{capabilities: canAll, tls: c}}, nil
}
