package remotes

import (
	"context"
	"crypto/tls"
	"encoding/pem"
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

// trusting is a directory of docker's certs.d form for a TLS registry.
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
		es, err := endpoints(registry, o)
		if err != nil {
			t.Fatal(err)
		}
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
	es, _ := endpoints("mirrored.example", Options{HostsDir: root})
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
	for _, bad := range []string{"server = ", `capabilities = ["fly"]`, `ca = 5`, `ca = "missing.crt"`, `client = [["a","b","c"]]`, `server = "http://"`, `header = 5`, `dial_timeout = "x"`, `realm = 5`, `realm = "sso.example"`, `realm = ["https://"]`, `realm = "https://me:word@sso.example"`, `realm = "ftp://sso.example"`, "[header]\nx = [1]"} {
		writeHosts(t, root, "bad.example", bad)
		_, err := endpoints("bad.example", Options{HostsDir: root})
		is(t, err, errdefs.IsInvalidArgument)
	}
}

// Mirrors come first; what they lack or can't do the next host does.
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
	f := newTLSFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	// An unknown authority is neither temporary nor "not found"; on loopback, where the
	// scheme is guessed, too.
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
	// A host that wants a certificate of its clients; since TLS 1.3 it may say so after the
	// request has gone out.
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
	// The other way round, where HTTP is no guess.
	writeHosts(t, root, f.host(), "server = 'http://"+f.host()+"'")
	for _, object := range []string{"latest", digest.FromString("x").String()} {
		_, err = fetch(t, open(t, f.host(), Options{HostsDir: root}), object)
		if err == nil || isTemporary(err) || errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "speaks HTTPS") {
			t.Errorf("HTTPS server spoken to in HTTP: %v", err)
		}
	}
}
