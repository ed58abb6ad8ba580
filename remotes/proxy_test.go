package remotes

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/errclass"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// proxyMain is this test binary under the name proxy-test. It resolves the tag latest at LOCATOR. It is a process of
// its own because net/http reads the environment only once. Names need not exist: an address other than the proxy's is
// dialled at TEST_DIRECT.
func proxyMain(locator, hosts string) int {
	said := func(s string) { fmt.Fprintln(os.Stderr, s) }
	r, err := Open(locator, Options{HostsDir: hosts, Debug: said, Notify: said, PlainHTTP: os.Getenv("TEST_PLAIN") != ""})
	if err != nil {
		said(err.Error())
		return 1
	}
	for _, c := range r.(*Registry).clients {
		c.pause = time.Millisecond
		t := c.http.Client.Transport.(roundTripper).RoundTripper.(*http.Transport)
		dial := t.DialContext
		t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr != os.Getenv("TEST_PROXY") {
				addr = os.Getenv("TEST_DIRECT")
			}
			return dial(ctx, network, addr)
		}
	}
	if _, err := r.Resolve(context.Background(), "latest"); err != nil {
		said(err.Error())
		return errclass.Status(err)
	}
	return 0
}

// testProxy forwards all requests to one registry, or, by CONNECT, to another.
type testProxy struct {
	*httptest.Server
	mu     sync.Mutex
	seen   []*http.Request
	refuse int
}

func newTestProxy(t *testing.T, plain, tls string) *testProxy {
	p := &testProxy{}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.seen = append(p.seen, r.Clone(context.Background()))
		refuse := p.refuse
		p.mu.Unlock()
		switch {
		case refuse != 0:
			w.WriteHeader(refuse)
		case r.Method == http.MethodConnect:
			to, err := net.Dial("tcp", tls)
			if err != nil {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			defer to.Close()
			conn, _, _ := http.NewResponseController(w).Hijack()
			defer conn.Close()
			fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n\r\n")
			go io.Copy(to, conn)
			io.Copy(conn, to)
		default:
			r.URL.Host, r.RequestURI = plain, ""
			r.Header.Del("Proxy-Authorization")
			resp, err := http.DefaultTransport.RoundTrip(r)
			if err != nil {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			defer resp.Body.Close()
			for k, v := range resp.Header {
				w.Header()[k] = v
			}
			w.WriteHeader(resp.StatusCode)
			io.Copy(w, resp.Body)
		}
	}))
	t.Cleanup(p.Close)
	return p
}

func TestProxy(t *testing.T) {
	t.Parallel()
	plain, secure := newFake(t), newTLSFake(t)
	for _, f := range []*fake{plain, secure} {
		f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
	}
	p := newTestProxy(t, plain.host(), secure.host())
	address := strings.TrimPrefix(p.URL, "http://")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	client := filepath.Join(t.TempDir(), "proxy-test")
	if err := os.Symlink(exe, client); err != nil {
		t.Fatal(err)
	}
	hosts := t.TempDir() // httptest's certificate is for example.com
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})
	for _, dir := range []string{"example.com", "docker.io"} {
		if err := os.Mkdir(filepath.Join(hosts, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(hosts, dir, "ca.crt"), ca, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// run resolves a tag at the host, and returns the client's output and the requests that the proxy received.
	run := func(host string, env ...string) (status int, said string, seen []*http.Request) {
		t.Helper()
		p.mu.Lock()
		p.seen = nil
		p.mu.Unlock()
		plain.reset()
		secure.reset()
		direct := plain.host()
		c := exec.Command(client, host+"/x", hosts)
		c.Env = append([]string{"PATH=" + os.Getenv("PATH"), "DOCKER_CONFIG=/nonexistent", "GORACE=atexit_sleep_ms=0", "TEST_PROXY=" + address}, env...)
		if host == "example.com" {
			direct = secure.host()
		} else {
			c.Env = append(c.Env, "TEST_PLAIN=yes")
		}
		c.Env = append(c.Env, "TEST_DIRECT="+direct)
		b, err := c.CombinedOutput()
		if c.ProcessState == nil {
			t.Fatal(err)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		return c.ProcessState.ExitCode(), string(b), p.seen
	}

	const name = "registry.example"
	for _, c := range []struct {
		host, env string
		proxied   bool
	}{
		{name, "", false},
		{name, "HTTP_PROXY=" + p.URL, true},
		{name, "http_proxy=" + p.URL, true},
		{name, "HTTP_PROXY=" + address, true},
		{name, "HTTPS_PROXY=" + p.URL, false},
		{"example.com", "HTTPS_PROXY=" + p.URL, true},
		{"example.com", "https_proxy=" + p.URL, true},
		{"example.com", "HTTP_PROXY=" + p.URL, false},
		// Hosts, including the names below them. A suffix that is not a domain does not match.
		{name, "HTTP_PROXY=" + p.URL + " NO_PROXY=registry.example", false},
		{name, "HTTP_PROXY=" + p.URL + " no_proxy=registry.example", false},
		{name, "HTTP_PROXY=" + p.URL + " NO_PROXY=other,REGISTRY.example", false},
		{name, "HTTP_PROXY=" + p.URL + " NO_PROXY=other.example", true},
		{"a.registry.example", "HTTP_PROXY=" + p.URL + " NO_PROXY=registry.example", false},
		{"a.registry.example", "HTTP_PROXY=" + p.URL + " NO_PROXY=.registry.example", false},
		{name, "HTTP_PROXY=" + p.URL + " NO_PROXY=.registry.example", true},
		{name, "HTTP_PROXY=" + p.URL + " NO_PROXY=istry.example", true},
		{"example.com", "HTTPS_PROXY=" + p.URL + " NO_PROXY=.com", false},
		{"example.com", "HTTPS_PROXY=" + p.URL + " NO_PROXY=.example", true},
		// Addresses, networks and ports.
		{"10.1.2.3", "HTTP_PROXY=" + p.URL + " NO_PROXY=10.1.2.3", false},
		{"10.1.2.3", "HTTP_PROXY=" + p.URL + " NO_PROXY=10.0.0.0/8", false},
		{"11.1.2.3", "HTTP_PROXY=" + p.URL + " NO_PROXY=10.0.0.0/8", true},
		{"[fd00::1]:5000", "HTTP_PROXY=" + p.URL + " NO_PROXY=fd00::/8", false},
		{name + ":5000", "HTTP_PROXY=" + p.URL + " NO_PROXY=registry.example:5000", false},
		{name + ":5001", "HTTP_PROXY=" + p.URL + " NO_PROXY=registry.example:5000", true},
		{name + ":5001", "HTTP_PROXY=" + p.URL + " NO_PROXY=registry.example", false},
		{name, "HTTP_PROXY=" + p.URL + " NO_PROXY=*", false},
		// This machine is always reached directly.
		{"127.0.0.1:5000", "HTTP_PROXY=" + p.URL, false},
		{"127.9.9.9:5000", "HTTP_PROXY=" + p.URL, false},
		{"localhost:5000", "HTTP_PROXY=" + p.URL, false},
		{"[::1]:5000", "HTTP_PROXY=" + p.URL, false},
	} {
		status, said, seen := run(c.host, strings.Fields(c.env)...)
		if status != 0 || plain.count()+secure.count() == 0 || len(seen) > 0 != c.proxied {
			t.Errorf("%s with %s: status %d, %d requests by the proxy, want %v: %s", c.host, c.env, status, len(seen), c.proxied, said)
		}
		if c.proxied && c.host != "example.com" && seen[0].RequestURI != "http://"+c.host+"/v2/x/manifests/latest" {
			t.Errorf("the proxy was asked for %s", seen[0].RequestURI)
		}
		if c.proxied && c.host == "example.com" && (len(seen) != 1 || seen[0].Method != http.MethodConnect || seen[0].RequestURI != "example.com:443") {
			t.Errorf("the proxy was asked for %s %s", seen[0].Method, seen[0].RequestURI)
		}
	}

	if status, said, _ := run("127.0.0.1:5000", "HTTP_PROXY=http://joe:s3cret%zz@x"); status != 0 {
		t.Errorf("a proxy that is not needed: %s", said)
	}

	// The proxy's password is sent to the proxy and to nobody else.
	const password = "s3cret"
	secret := func(said string, requests ...*http.Request) {
		t.Helper()
		for _, s := range []string{password, basic("joe:" + password)} {
			if strings.Contains(said, s) {
				t.Errorf("it says the password: %s", said)
			}
		}
		for _, r := range requests {
			if len(r.Header.Values("Proxy-Authorization"))+len(r.Header.Values("Authorization")) > 0 {
				t.Errorf("the registry got %v", r.Header)
			}
		}
	}
	withPassword := strings.Replace(p.URL, "http://", "http://joe:"+password+"@", 1)
	for host, env := range map[string]string{name: "HTTP_PROXY", "example.com": "HTTPS_PROXY"} {
		status, said, seen := run(host, env+"="+withPassword)
		if status != 0 || len(seen) == 0 || seen[0].Header.Get("Proxy-Authorization") != "Basic "+basic("joe:"+password) {
			t.Errorf("%s: status %d, %s", host, status, said)
		}
		secret(said, append(plain.requests, secure.requests...)...)
		// Without the proxy, nobody gets it.
		status, said, seen = run(host, env+"="+withPassword, "NO_PROXY="+host)
		if status != 0 || len(seen) != 0 {
			t.Errorf("%s: status %d, %s", host, status, said)
		}
		secret(said, append(plain.requests, secure.requests...)...)

		// A refusal of the proxy has the class of its status, and the request is not repeated.
		for refusal, want := range map[int]int{407: 9, 403: 9, 503: 6} {
			p.refuse = refusal
			status, said, seen = run(host, env+"="+withPassword)
			if status != want || want == 9 && len(seen) > 2 || want == 6 && len(seen) < 2 {
				t.Errorf("%s: %d: status %d after %d requests: %s", host, refusal, status, len(seen), said)
			}
			secret(said)
		}
		p.refuse = 0

		// A proxy that does not exist, or is not a proxy.
		none := nobody(t)
		if status, said, _ := run(host, env+"=http://joe:"+password+"@"+none, "TEST_PROXY="+none); status != 6 || !strings.Contains(said, "refused") {
			t.Errorf("%s: status %d: %s", host, status, said)
		} else {
			secret(said)
		}
		for _, bad := range []string{"http://joe:" + password + "%zz@x", "http://joe:" + password + "@[::1", "http://joe:" + password + "/x@x:3128",
			"http://joe:" + password + "#x@x", "http://joe:" + password + "?x@x", "joe:" + password + " x@x", "ftp://joe:" + password + "@x", "://" + password} {
			status, said, _ := run(host, env+"="+bad)
			if status != 2 || !strings.Contains(said, "proxy") {
				t.Errorf("%s: status %d: %s", host, status, said)
			}
			secret(said)
		}
	}
}

// nobody is an address at which nothing listens.
func nobody(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
