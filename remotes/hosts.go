package remotes

import (
	"bytes"
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
	"slices"
	"strings"
	"time"
	"unicode"

	"distkit/disk/program"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// capability is what a host may be used for.
type capability uint8

const (
	canPull capability = 1 << iota
	canResolve
	canPush
	canAll = canPull | canResolve | canPush
)

// endpoint is one host that serves a registry's repositories. The terms are containerd's.
type endpoint struct {
	scheme, host, path string // path is the API's root, /v2
	capabilities       capability
	header             http.Header
	tls                *tls.Config // nil means the default
	dialTimeout        time.Duration
	guessed            bool       // the scheme is a guess: HTTP, because the host is this machine
	realms             []*url.URL // further token servers that may get the credentials
	proxy              *url.URL   // nil means that of the environment
}

// hostConfig is a registry's configuration from the hosts directories.
type hostConfig struct {
	helper, address string     // of a program dist-remote-NAME; "" if there is none
	endpoints       []endpoint // the hosts to try, in order: mirrors, then the registry itself
}

// readHosts reads a registry's configuration. Without any, the registry itself is the only host.
func readHosts(registry string, o Options) (hostConfig, error) {
	config := hostConfig{endpoints: []endpoint{{capabilities: canAll}}}
	dir, err := hostDir(hostRoots(o), registry)
	if err == nil && dir != "" {
		config, err = readHostDir(dir)
	}
	if err != nil || config.helper != "" {
		return config, err
	}
	list := config.endpoints
	last := &list[len(list)-1]
	if err := last.addHeaders(o.Headers); err != nil {
		return config, err
	}
	for i := range list {
		if list[i].tls, err = addTLS(list[i].tls, o); err != nil {
			return config, err
		}
	}
	if last.host == "" {
		last.scheme, last.host, last.path = "https", registry, "/v2"
		switch {
		case registry == dockerHub:
			last.host = "registry-1.docker.io"
		case o.PlainHTTP:
			last.scheme = "http"
		case isLoopback(registry) && last.tls == nil:
			if _, port, err := net.SplitHostPort(registry); err == nil && port != "443" {
				last.scheme, last.guessed = "http", true
			}
		}
	}
	return config, nil
}

// readHost reads the configuration of a host. The returned locator has no repository.
func readHost(host string, o Options) (l Locator, config hostConfig, err error) {
	if l, err = ParseLocator(host + "/x"); err == nil && l.Host == "" {
		err = classf(errdefs.ErrInvalidArgument, "%q is not the host of a registry", host)
	}
	if err == nil {
		config, err = readHosts(l.Host, o)
	}
	if err == nil && config.helper != "" {
		err = classf(errdefs.ErrNotImplemented, "%s is served by dist-remote-%s, not by a registry", l.Host, config.helper)
	}
	return Locator{Host: l.Host}, config, err
}

// addTLS adds the certificate options to a host's own configuration.
func addTLS(c *tls.Config, o Options) (*tls.Config, error) {
	if len(o.CA) == 0 && !o.Insecure {
		return c, nil
	}
	if c == nil {
		c = &tls.Config{}
	}
	c.InsecureSkipVerify = c.InsecureSkipVerify || o.Insecure
	if err := trust(c, o.CA); err != nil {
		return nil, errclass.As(err, errdefs.ErrInvalidArgument)
	}
	return c, nil
}

// addHeaders adds header lines of the form NAME: VALUE to the endpoint. Errors don't show values, which may be secret.
func (e *endpoint) addHeaders(lines []string) error {
	for i, line := range lines {
		name, value, ok := strings.Cut(line, ":")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		if !ok || name == "" || token(name) != name || strings.ContainsFunc(value, unicode.IsControl) {
			return classf(errdefs.ErrInvalidArgument, "header %d is not NAME: VALUE", i+1)
		}
		e.addHeader(name, value)
	}
	return nil
}

func (e *endpoint) addHeader(name, value string) {
	if e.header == nil {
		e.header = http.Header{}
	}
	e.header.Add(name, value)
}

func isLoopback(hostport string) bool {
	host := hostport
	if h, _, err := net.SplitHostPort(hostport); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// hostRoots lists the directories with a subdirectory per host. The user's own comes before the system's.
func hostRoots(o Options) []string {
	if o.HostsDir != "" && o.HostsDir != DefaultHostsDir {
		return filepath.SplitList(o.HostsDir)
	}
	roots := filepath.SplitList(DefaultHostsDir)
	if dir := userConfig("containers", "certs.d"); dir != "" {
		roots = append([]string{dir}, roots...)
	}
	return roots
}

func hostDirNames(host string) []string {
	if i := strings.LastIndexByte(host, ':'); i > 0 && !strings.HasSuffix(host, "]") {
		return []string{host[:i] + "_" + host[i+1:] + "_", host}
	}
	return []string{host}
}

// hostDir finds the directory of a host as containerd does: HOST_PORT_, HOST:PORT or _default. _default is used only if
// no root has a directory for the host.
func hostDir(roots []string, host string) (string, error) {
	for _, names := range [][]string{hostDirNames(host), {"_default"}} {
		for _, root := range roots {
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
	Proxy        *string        `toml:"proxy"`
}

// readHostDir reads hosts.toml or, without it, certificates as in docker's certs.d. If the file names no server, the
// last endpoint has no host.
func readHostDir(dir string) (hostConfig, error) {
	file := filepath.Join(dir, "hosts.toml")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(bytes.TrimSpace(b)) == 0 {
		e, err := readCertDir(dir)
		return hostConfig{endpoints: []endpoint{e}}, err
	}
	if err != nil {
		return hostConfig{}, err
	}
	config, err := parseHosts(dir, b)
	if err != nil && !errdefs.IsPermissionDenied(err) {
		err = errclass.As(err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return hostConfig{}, fmt.Errorf("%s: %w", file, err)
	}
	return config, nil
}

func parseHosts(dir string, b []byte) (hostConfig, error) {
	var c struct {
		hostFile
		Server  string              `toml:"server"`
		Hosts   map[string]hostFile `toml:"host"`
		Helper  *string             `toml:"helper"`
		Blocked bool                `toml:"blocked"`
	}
	if err := decodeTOML(b, &c); err != nil {
		return hostConfig{}, err
	}
	switch {
	case c.Blocked:
		return hostConfig{}, classf(errdefs.ErrPermissionDenied, "the registry is blocked")
	case c.Helper != nil && (!program.IsName(*c.Helper) || c.Server == "" || c.Server[0] == '-' || len(c.Hosts) > 0):
		return hostConfig{}, fmt.Errorf("helper %q needs a name of a-z, 0-9 and -, a server, and no host", *c.Helper)
	case c.Helper != nil:
		return hostConfig{helper: *c.Helper, address: strings.TrimSuffix(c.Server, "/")}, nil
	}
	var config hostConfig
	for _, name := range hostOrder(b) {
		e, err := newEndpoint(dir, name, c.Hosts[name])
		if err != nil {
			return config, fmt.Errorf("host %q: %w", name, err)
		}
		config.endpoints = append(config.endpoints, e)
	}
	e, err := newEndpoint(dir, c.Server, c.hostFile)
	config.endpoints = append(config.endpoints, e)
	return config, err
}

// decodeTOML decodes a document. An unknown key is an error, so that a misspelt setting is not ignored.
func decodeTOML(b []byte, v any) error {
	d := toml.NewDecoder(bytes.NewReader(b))
	err := d.DisallowUnknownFields().Decode(v)
	var strict *toml.StrictMissingError
	var syntax *toml.DecodeError
	switch {
	case errors.As(err, &strict) && len(strict.Errors) > 0:
		e := strict.Errors[0]
		line, _ := e.Position()
		return fmt.Errorf("line %d: unknown key %s", line, printable(strings.Join(e.Key(), ".")))
	case errors.As(err, &syntax):
		line, _ := syntax.Position()
		return fmt.Errorf("line %d: %s", line, printable(syntax.Error()))
	case err != nil:
		return errors.New(printable(err.Error()))
	}
	return nil
}

// hostOrder lists the names in "host" in the order of the file, which a map loses. TOML can write a table as
// [host."…"], host."…".key = value, or {…}.
func hostOrder(b []byte) []string {
	var order, table []string
	add := func(key []string) {
		if len(key) >= 2 && key[0] == "host" && !slices.Contains(order, key[1]) {
			order = append(order, key[1])
		}
	}
	p := unstable.Parser{}
	p.Reset(b)
	for p.NextExpression() {
		e := p.Expression()
		key := keyOf(e)
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = key
		case unstable.KeyValue:
			key = slices.Concat(table, key)
			if value := e.Value(); len(key) == 1 && value.Kind == unstable.InlineTable {
				for it := value.Children(); it.Next(); {
					add(slices.Concat(key, keyOf(it.Node())))
				}
			}
		}
		add(key)
	}
	return order
}

func keyOf(n *unstable.Node) (key []string) {
	if n.Kind != unstable.Table && n.Kind != unstable.ArrayTable && n.Kind != unstable.KeyValue {
		return nil
	}
	for it := n.Key(); it.Next(); {
		key = append(key, string(it.Node().Data))
	}
	return key
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
		for _, v := range values {
			e.addHeader(name, v)
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
	if c.Proxy != nil {
		if e.proxy, err = url.Parse(*c.Proxy); err != nil || !isProxyAddress(e.proxy) {
			return e, errors.New("malformed proxy address: " + proxyForm) // don't show the address, which may hold a password
		}
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

// clientPairs parses pairs of a certificate and its key. One file may hold both.
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
		case len(files) == 1, len(files) == 2 && files[1] == "":
			pairs = append(pairs, [2]string{files[0], files[0]})
		case len(files) == 2:
			pairs = append(pairs, [2]string{files[0], files[1]})
		default:
			return nil, fmt.Errorf("%v is not a pair of certificate and key", files)
		}
	}
	return pairs, nil
}

// newTLS returns nil if everything is the default.
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
	for i, file := range cas {
		cas[i] = abs(file)
	}
	if err := trust(c, cas); err != nil {
		return nil, err
	}
	for _, p := range pairs {
		cert, err := tls.LoadX509KeyPair(abs(p[0]), abs(p[1]))
		if err != nil && p[0] == p[1] {
			return nil, fmt.Errorf("client: %s has no key in it, and none in a .key file beside it: %w", p[0], err)
		}
		if err != nil {
			return nil, fmt.Errorf("client: %w", err)
		}
		c.Certificates = append(c.Certificates, cert)
	}
	return c, nil
}

// trust adds the authorities in files to the system's.
func trust(c *tls.Config, cas []string) error {
	if len(cas) == 0 {
		return nil
	}
	if c.RootCAs == nil {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		c.RootCAs = pool
	}
	for _, file := range cas {
		b, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("ca: %w", err)
		}
		if !c.RootCAs.AppendCertsFromPEM(b) {
			return fmt.Errorf("ca: %s has no certificate", file)
		}
	}
	return nil
}

// readCertDir reads *.crt as authorities, and *.cert with *.key as client certificates, as docker and podman do. A
// certificate without a key, or a key without a certificate, is an error. One file may hold both.
func readCertDir(dir string) (endpoint, error) {
	e := endpoint{capabilities: canAll}
	files, err := os.ReadDir(dir)
	if err != nil {
		return e, err
	}
	has := func(name string) bool {
		return slices.ContainsFunc(files, func(f fs.DirEntry) bool { return f.Name() == name })
	}
	var cas []string
	var pairs [][2]string
	for _, f := range files {
		name, base := f.Name(), strings.TrimSuffix(f.Name(), filepath.Ext(f.Name()))
		switch filepath.Ext(name) {
		case ".crt":
			cas = append(cas, name)
		case ".cert":
			key := base + ".key"
			if !has(key) {
				key = name
			}
			pairs = append(pairs, [2]string{name, key})
		case ".key":
			if !has(base + ".cert") {
				return e, classf(errdefs.ErrInvalidArgument, "%s: %s has no %s.cert: a client certificate ends in .cert, that of an authority in .crt", dir, name, base)
			}
		}
	}
	if e.tls, err = newTLS(dir, cas, pairs, nil); err != nil {
		return e, classf(errdefs.ErrInvalidArgument, "%s: %w", dir, err)
	}
	return e, nil
}
