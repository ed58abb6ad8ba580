package remotes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var zero time.Time

func writeHosts(t *testing.T, root, host, content string) {
	t.Helper()
	dir := filepath.Join(root, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func certificate(t *testing.T, f *fake, file string) {
	t.Helper()
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// trusting returns a directory in the form of docker's certs.d, for a registry with TLS.
func trusting(t *testing.T, f *fake) string {
	root := t.TempDir()
	certificate(t, f, filepath.Join(root, f.host(), "ca.crt"))
	return root
}

const tinyManifest = `{"schemaVersion":2,"layers":[]}`

func TestHostsServer(t *testing.T) {
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		r.URL.Path = strings.Replace(r.URL.Path, "/v2/library/redis/", "/v2/x/", 1)
		return false
	})
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	root := t.TempDir()
	writeHosts(t, root, "docker.io", `server = "http://`+f.host()+`"`)
	for _, locator := range []string{"docker.io/library/redis", "docker.io/redis", "index.docker.io/redis"} {
		r, err := Open(locator, Options{HostsDir: "/nonexistent:" + root})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fetch(t, r, "latest"); err != nil {
			t.Error(err)
		}
	}
	if got := f.request(0).URL.Query().Get("ns"); got != "docker.io" {
		t.Errorf("ns=%s", got)
	}
}

func TestEndpoints(t *testing.T) {
	root := t.TempDir()
	writeHosts(t, root, "mirrored.example", `
server = "https://upstream.example"
capabilities = ["pull"]
[host."https://b.example/path"]
  capabilities = ["pull", "Resolve"]
[host."https://a.example/some/v2"]
[host."https://a.example/some/v2".header]
  X = ["1", "2"]
[host."c.example:8080"]
  override_path = true
  skip_verify = true
  dial_timeout = "3s"
[host."http://d.example/own/"]
  override_path = true
`)
	writeHosts(t, root, "port.example_5000_", `server = "http://one"`)
	writeHosts(t, root, "port.example:5000", `server = "http://two"`)
	writeHosts(t, root, "both.example", "[host.'http://m']\n")
	describe := func(registry string, o Options) (list []string) {
		t.Helper()
		o.HostsDir = root
		config, err := readHosts(registry, o)
		if err != nil {
			t.Fatal(err)
		}
		es := config.endpoints
		for _, e := range es {
			list = append(list, e.scheme+"://"+e.host+e.path)
		}
		return list
	}
	for _, c := range []struct {
		registry string
		o        Options
		want     string
	}{
		{"docker.io", Options{}, "https://registry-1.docker.io/v2"},
		{"docker.io", Options{PlainHTTP: true}, "https://registry-1.docker.io/v2"},
		{"quay.io", Options{}, "https://quay.io/v2"},
		{"quay.io", Options{PlainHTTP: true}, "http://quay.io/v2"},
		{"localhost:5000", Options{}, "http://localhost:5000/v2"},
		{"127.1.2.3:5000", Options{}, "http://127.1.2.3:5000/v2"},
		{"[::1]:5000", Options{}, "http://[::1]:5000/v2"},
		{"localhost:443", Options{}, "https://localhost:443/v2"},
		{"localhost", Options{}, "https://localhost/v2"},
		{"10.0.0.1:5000", Options{}, "https://10.0.0.1:5000/v2"},
		{"localhost.example:5000", Options{}, "https://localhost.example:5000/v2"},
		{"mirrored.example", Options{}, "https://b.example/path/v2 https://a.example/some/v2 https://c.example:8080 http://d.example/own https://upstream.example/v2"},
		{"port.example:5000", Options{}, "http://one/v2"},
		{"both.example", Options{}, "http://m/v2 https://both.example/v2"},
	} {
		if got := strings.Join(describe(c.registry, c.o), " "); got != c.want {
			t.Errorf("%s: %s, not %s", c.registry, got, c.want)
		}
	}
	config, _ := readHosts("mirrored.example", Options{HostsDir: root})
	es := config.endpoints
	if es[0].capabilities != canPull|canResolve || es[1].capabilities != canAll || es[4].capabilities != canPull {
		t.Error("capabilities")
	}
	if !slices.Equal(es[1].header["X"], []string{"1", "2"}) || es[0].header != nil {
		t.Error("header")
	}
	if es[2].tls == nil || !es[2].tls.InsecureSkipVerify || es[2].dialTimeout != 3*time.Second || es[0].tls != nil {
		t.Error("tls, timeout")
	}
	writeHosts(t, root, "_default", `server = "http://fallback"`)
	if got := describe("quay.io", Options{}); got[0] != "http://fallback/v2" {
		t.Errorf("_default: %v", got)
	}
	for _, bad := range []string{"server = ", `capabilities = ["fly"]`, `ca = 5`, `ca = "missing.crt"`, `client = [["a","b","c"]]`, `server = "http://"`, `header = 5`, `dial_timeout = "x"`, `realm = 5`, `realm = "sso.example"`, `realm = ["https://"]`, `realm = "https://me:word@sso.example"`, `realm = "ftp://sso.example"`, "[header]\nx = [1]",
		"servr = 'https://h'", "capabilites = ['pull']", "[host.'http://m']\nskip-verify = true", "[host.'http://m'.headers]\nx = 'y'", "host.'http://m'.capabilites = ['pull']",
		"[mirror.'http://m']", "[[host]]", "proxy = 5", "proxy = ''", "proxy = 'proxy.example:3128'", "proxy = 'ftp://S3CRET@p'", "proxy = 'http://me:S3%CRET@p'", "proxy = 'http://p/S3CRET'",
		"[host.'http://m']\nproxy = 'S3CRET'", "helper = ''", "helper = 'x'", "helper = 'X'\nserver = 's'", "helper = 'x'\nserver = '-s'", "helper = 'x'\nserver = 's'\n[host.'http://m']", "blocked = 'yes'", "a = S3CRET"} {
		writeHosts(t, root, "bad.example", bad)
		_, err := readHosts("bad.example", Options{HostsDir: root})
		is(t, err, errdefs.IsInvalidArgument)
		if !strings.Contains(err.Error(), "bad.example") || strings.Contains(err.Error(), "S3CRET") {
			t.Errorf("%s: %v", bad, err)
		}
	}
	writeHosts(t, root, "blocked.example", "blocked = true")
	_, err := Open("blocked.example/x", Options{HostsDir: root})
	is(t, err, errdefs.IsPermissionDenied)
}

// A table may be written in each form that TOML has. The hosts have the order of the file.
func TestHostsForms(t *testing.T) {
	root := t.TempDir()
	for _, form := range []string{
		"[host.'http://b']\ncapabilities = ['pull']\n[host.'http://a']\ncapabilities = ['pull']\n",
		"host.'http://b'.capabilities = ['pull']\nhost.'http://a'.capabilities = ['pull']\n",
		"host.\"http://b\" = {capabilities = ['pull']}\nhost . 'http://a' . capabilities = ['pull']\n",
		"host = {'http://b' = {capabilities = ['pull']}, 'http://a' = {capabilities = ['pull']}}\n",
		"[host]\n'http://b' = {capabilities = ['pull']}\n'http://a'.capabilities = ['pull']\n",
	} {
		writeHosts(t, root, "h.example", "server = 'http://c'\n"+form)
		config, err := readHosts("h.example", Options{HostsDir: root})
		if err != nil {
			t.Errorf("%s: %v", form, err)
			continue
		}
		var got []string
		for _, e := range config.endpoints {
			got = append(got, e.host)
		}
		if strings.Join(got, "") != "bac" || config.endpoints[0].capabilities != canPull || config.endpoints[1].capabilities != canPull {
			t.Errorf("%s: %+v", form, config.endpoints)
		}
	}
}

// Each host may have its own proxy, whatever the environment says. The proxy's credentials are sent only to that proxy.
func TestHostsProxy(t *testing.T) {
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	p := newTestProxy(t, f.host(), "")
	root := t.TempDir()
	address := strings.TrimPrefix(p.URL, "http://")
	writeHosts(t, root, "registry.example", "server = 'http://registry.example'\nproxy = 'http://me:S3CRET@"+address+"'")
	var debug []string
	r := open(t, "registry.example", Options{HostsDir: root, Debug: func(s string) { debug = append(debug, s) }})
	if _, err := fetch(t, r, "latest"); err != nil {
		t.Fatal(err)
	}
	if len(p.seen) != 1 || p.seen[0].Host != "registry.example" || p.seen[0].Header.Get("Proxy-Authorization") != "Basic "+basic("me:S3CRET") {
		t.Errorf("the proxy saw %v", p.seen)
	}
	if h := f.request(0).Header; h.Get("Proxy-Authorization") != "" || strings.Contains(strings.Join(debug, ""), "S3CRET") {
		t.Errorf("told: %v, %q", h, debug)
	}
	p.refuse = http.StatusProxyAuthRequired
	_, err := fetch(t, open(t, "registry.example", Options{HostsDir: root}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	p.Close()
	_, err = fetch(t, open(t, "registry.example", Options{HostsDir: root}), "latest")
	is(t, err, isTemporary)
	if strings.Contains(err.Error(), "S3CRET") {
		t.Error(err)
	}
}

// The root directories are those of docker, podman and containerd. A host's own directory takes precedence over any
// _default, and the user's directories over the system's.
func TestHostDirs(t *testing.T) {
	one, two, config := t.TempDir(), t.TempDir(), t.TempDir()
	writeHosts(t, one, "_default", "server = 'http://default'")
	writeHosts(t, two, "h.example_5000_", "server = 'http://own'")
	o := Options{HostsDir: one + ":" + two}
	for host, want := range map[string]string{"h.example:5000": "own", "h.example": "default", "h.example:5001": "default"} {
		config, err := readHosts(host, o)
		if err != nil || config.endpoints[0].host != want {
			t.Errorf("%s: %+v, %v", host, config, err)
		}
	}
	t.Setenv("XDG_CONFIG_HOME", config)
	writeHosts(t, filepath.Join(config, "containers", "certs.d"), "h.example", "server = 'http://user'")
	for _, dir := range []string{"", DefaultHostsDir} {
		config, err := readHosts("h.example", Options{HostsDir: dir})
		if err != nil || config.endpoints[0].host != "user" {
			t.Errorf("%q: %+v, %v", dir, config, err)
		}
	}
	if !slices.Contains(hostRoots(Options{}), "/etc/containers/certs.d") {
		t.Error("podman's directory is not looked at")
	}
}

// certs.d: files that docker and podman refuse are refused, and named in the error.
func TestCertDir(t *testing.T) {
	cert, key := clientCertificate(t)
	for _, c := range []struct {
		files map[string]string
		want  string // a part of the error; empty: success
	}{
		{map[string]string{"ca.crt": cert, "client.cert": cert, "client.key": key}, ""},
		{map[string]string{"client.cert": cert + key}, ""},
		{map[string]string{"README": "x"}, ""},
		{map[string]string{"client.cert": cert}, "client.cert has no key"},
		{map[string]string{"client.key": key}, "no client.cert"},
		{map[string]string{"client.crt": cert, "client.key": key}, "no client.cert"},
		{map[string]string{"ca.crt": "x"}, "has no certificate"},
		{map[string]string{"client.cert": cert, "client.key": "x"}, "client: "},
	} {
		root := t.TempDir()
		writeHosts(t, root, "h.example", "")
		for name, content := range c.files {
			if err := os.WriteFile(filepath.Join(root, "h.example", name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err := readHosts("h.example", Options{HostsDir: root})
		if c.want == "" && err != nil {
			t.Errorf("%v", err)
		} else if c.want != "" {
			is(t, err, errdefs.IsInvalidArgument)
			if !strings.Contains(err.Error(), c.want) {
				t.Error(err)
			}
		}
	}
	// From containerd's documentation: one file with a certificate and its key, and a pair whose key is empty.
	root := t.TempDir()
	for _, client := range []string{`"both.pem"`, `["both.pem"]`, `[["both.pem", ""]]`, `[["both.pem", "both.pem"], ["both.pem", ""]]`} {
		writeHosts(t, root, "h.example", "client = "+client)
		if err := os.WriteFile(filepath.Join(root, "h.example", "both.pem"), []byte(cert+key), 0o600); err != nil {
			t.Fatal(err)
		}
		if config, err := readHosts("h.example", Options{HostsDir: root}); err != nil || len(config.endpoints[0].tls.Certificates) == 0 {
			t.Errorf("%s: %v", client, err)
		}
	}
}

func clientCertificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	c, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// --ca, --insecure and --header are like a hosts.toml for one call. Headers are sent only to the registry.
func TestTLSOptions(t *testing.T) {
	f := newTLSFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	ca := filepath.Join(t.TempDir(), "ca.pem")
	certificate(t, f, ca)
	for _, o := range []Options{{CA: []string{ca}}, {Insecure: true}} {
		if _, err := fetch(t, open(t, f.host(), o), "latest"); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
	for _, o := range []Options{{CA: []string{"missing.pem"}}, {CA: []string{os.DevNull}}, {Headers: []string{"S3CRET"}}, {Headers: []string{"X: S3C\rRET"}}, {Headers: []string{"X Y: S3CRET"}}, {Headers: []string{": S3CRET"}}} {
		o.HostsDir = t.TempDir()
		_, err := Open(f.host()+"/x", o)
		is(t, err, errdefs.IsInvalidArgument)
		if strings.Contains(err.Error(), "S3CRET") {
			t.Error(err)
		}
	}
	mirror, registry := newFake(t), newFake(t)
	registry.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	root := t.TempDir()
	writeHosts(t, root, "h.example", "server = '"+registry.URL+"'\n[host.'"+mirror.URL+"']")
	if _, err := fetch(t, open(t, "h.example", Options{HostsDir: root, Headers: []string{"x-key:  a b ", "Cookie: c"}}), "latest"); err != nil {
		t.Fatal(err)
	}
	if got := registry.request(0).Header; got.Get("X-Key") != "a b" || got.Get("Cookie") != "c" || mirror.request(0).Header.Get("X-Key") != "" {
		t.Errorf("registry %v, mirror %v", got, mirror.request(0).Header)
	}
}

// Mirrors are asked first. If a mirror does not have an object or fails, the next host is asked.
func TestMirrors(t *testing.T) {
	dead, empty, mirror, upstream := newFake(t), newFake(t), newFake(t), newFake(t)
	dead.Close()
	content := noise(100000)
	id := mirror.blob(content)
	upstream.blob(content)
	upstream.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	root := t.TempDir()
	writeHosts(t, root, "good.example", `
server = "`+upstream.URL+`"
[host."`+dead.URL+`"]
[host."`+empty.URL+`"]
[host."`+mirror.URL+`"]
capabilities = ["pull"]
`)
	r := open(t, "good.example", Options{HostsDir: root})
	if got, err := fetch(t, r, id); err != nil || string(got) != string(content) {
		t.Fatal(err)
	}
	if mirror.count() != 1 || upstream.count() != 0 {
		t.Errorf("mirror %q, upstream %q", mirror.seen(), upstream.seen())
	}
	if mirror.request(0).URL.Query().Get("ns") != "good.example" {
		t.Error("the mirror was not told for whom it stands in")
	}
	if _, err := r.Resolve(context.Background(), "latest"); err != nil {
		t.Fatal(err)
	}
	if mirror.count() != 1 {
		t.Error("a mirror that can't resolve was asked to")
	}
	_, err := fetch(t, r, "nope")
	is(t, err, errdefs.IsNotFound)

	writeHosts(t, root, "none.example", "server = '"+upstream.URL+"'\ncapabilities = ['push']")
	_, err = fetch(t, open(t, "none.example", Options{HostsDir: root}), id)
	is(t, err, errdefs.IsFailedPrecondition)
}

func TestTLS(t *testing.T) {
	t.Parallel()
	f := newTLSFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	// An unknown authority is neither a temporary failure nor "not found". That is so on a loopback address, too, where
	// the scheme is guessed.
	for _, config := range []string{"", "server = '" + f.URL + "'"} {
		root := t.TempDir()
		writeHosts(t, root, f.host(), config)
		f.reset()
		_, err := fetch(t, open(t, f.host(), Options{HostsDir: root}), "latest")
		if err == nil || isTemporary(err) || errdefs.IsNotFound(err) || errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), "TLS") {
			t.Errorf("unknown authority: %v", err)
		}
	}
	if _, err := fetch(t, open(t, f.host(), Options{HostsDir: trusting(t, f)}), "latest"); err != nil {
		t.Errorf("certs.d: %v", err)
	}
	root := t.TempDir()
	writeHosts(t, root, f.host(), "server = '"+f.URL+"'\nca = 'my.pem'")
	certificate(t, f, filepath.Join(root, f.host(), "my.pem"))
	if _, err := fetch(t, open(t, f.host(), Options{HostsDir: root}), "latest"); err != nil {
		t.Errorf("ca: %v", err)
	}
	writeHosts(t, root, f.host(), "server = '"+f.URL+"'\nskip_verify = true")
	if _, err := fetch(t, open(t, f.host(), Options{HostsDir: root}), "latest"); err != nil {
		t.Errorf("skip_verify: %v", err)
	}
	// A host that requires a certificate of its clients. With TLS 1.3 it may refuse after the request was sent.
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		strict := unstarted()
		strict.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, MaxVersion: version}
		strict.StartTLS()
		t.Cleanup(strict.Close)
		for range 20 {
			_, err := fetch(t, open(t, strict.host(), Options{HostsDir: trusting(t, strict)}), "latest")
			if err == nil || isTemporary(err) || !strings.Contains(err.Error(), "TLS") {
				t.Fatalf("without a client's certificate: %v", err)
			}
		}
	}
	plain := newFake(t)
	writeHosts(t, root, plain.host(), "server = 'https://"+plain.host()+"'")
	_, err := fetch(t, open(t, plain.host(), Options{HostsDir: root}), "latest")
	if err == nil || isTemporary(err) || !strings.Contains(err.Error(), "--plain-http") {
		t.Errorf("HTTP server spoken to in HTTPS: %v", err)
	}
	// The reverse, where HTTP was configured and is not a guess.
	writeHosts(t, root, f.host(), "server = 'http://"+f.host()+"'")
	for _, object := range []string{"latest", digest.FromString("x").String()} {
		_, err = fetch(t, open(t, f.host(), Options{HostsDir: root}), object)
		if err == nil || isTemporary(err) || errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "speaks HTTPS") {
			t.Errorf("HTTPS server spoken to in HTTP: %v", err)
		}
	}
}
