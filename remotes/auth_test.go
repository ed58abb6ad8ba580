package remotes

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tokens is a registry with a token server. Both are strict.
type tokens struct {
	*fake
	realm    *httptest.Server
	asked    []*http.Request // the requests to the token server
	forms    []string
	user     string // user:password that the token server expects; empty: none
	identity string // identity token that the token server expects
}

func newTokens(t *testing.T) *tokens {
	k := &tokens{fake: newFake(t)}
	k.manifest("latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
	k.realm = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		k.asked = append(k.asked, r)
		k.forms = append(k.forms, r.Form.Encode())
		user, password, _ := r.BasicAuth()
		switch {
		case k.identity != "" && r.PostForm.Get("refresh_token") == k.identity:
		case k.identity == "" && (k.user == "" || k.user == user+":"+password):
		default:
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"wrong password"}]}`)
			return
		}
		fmt.Fprint(w, `{"token":"secret-token","access_token":"secret-token"}`)
	}))
	t.Cleanup(k.realm.Close)
	k.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Header.Get("Authorization") == "Bearer secret-token" {
			return false
		}
		w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="a registry",scope="repository:x:pull"`, k.realm.URL))
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
		return true
	})
	return k
}

// dockerConfig writes a config.json, in which %s is the host.
func dockerConfig(t *testing.T, content string) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
}

func basic(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func TestTokenAnonymous(t *testing.T) {
	k := newTokens(t)
	var debug []string
	r := open(t, k.host(), Options{Debug: func(s string) { debug = append(debug, s) }})
	for range 2 {
		if _, err := fetch(t, r, "latest"); err != nil {
			t.Fatal(err)
		}
	}
	if len(k.asked) != 1 {
		t.Errorf("%d tokens were asked for", len(k.asked))
	}
	if got := k.forms[0]; got != "scope=repository%3Ax%3Apull&service=a+registry" {
		t.Errorf("the token was asked for with %q", got)
	}
	if k.asked[0].Header.Get("Authorization") != "" {
		t.Error("credentials out of nothing")
	}
	all := strings.Join(debug, "\n")
	if len(debug) != 4 || strings.Contains(all, "secret-token") || strings.Contains(all, "scope") {
		t.Errorf("debug lines:\n%s", all)
	}
}

func TestTokenWithPassword(t *testing.T) {
	k := newTokens(t)
	k.user = "me:pass:word"
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:pass:word")+`"}}}`)
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil {
		t.Fatal(err)
	}
	k.user = "me:other"
	_, err := fetch(t, open(t, k.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if !strings.Contains(err.Error(), "wrong password") || strings.Contains(err.Error(), "pass:word") {
		t.Error(err)
	}
}

func TestTokenWithIdentityToken(t *testing.T) {
	k := newTokens(t)
	k.identity = "an-identity"
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"identitytoken":"an-identity"}}}`)
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil {
		t.Fatal(err)
	}
	if k.asked[0].Method != http.MethodPost {
		t.Error("the identity token was not posted")
	}
}

func TestRegistryAuthFile(t *testing.T) {
	k := newTokens(t)
	k.user = "me:word"
	dockerConfig(t, `{"auths":{"`+k.host()+`":{"auth":"`+basic("me:other")+`"}}}`)
	file := k.authFile(t, "me:word")
	if _, err := fetch(t, open(t, k.host(), Options{AuthFile: file}), "latest"); err != nil {
		t.Fatal(err)
	}
	// The identity comes from a pipe, which can be read only once, with a token cache.
	runtimeDir(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fmt.Fprintf(w, `{"auths":{"%s":{"auth":"%s"}}}`, k.host(), basic("me:word"))
	w.Close()
	if _, err := fetch(t, open(t, k.host(), Options{AuthFile: fmt.Sprintf("/dev/fd/%d", r.Fd())}), "latest"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("REGISTRY_AUTH_FILE", file)
	if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil {
		t.Fatal(err)
	}
}

func TestTokenServerDown(t *testing.T) {
	t.Parallel()
	k := newTokens(t)
	k.realm.Close()
	_, err := fetch(t, open(t, k.host(), Options{}), "latest")
	is(t, err, errdefs.IsAborted)

	k = newTokens(t)
	k.realm.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.asked = append(k.asked, r)
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	_, err = fetch(t, open(t, k.host(), Options{}), "latest")
	is(t, err, errdefs.IsAborted)
	if len(k.asked) != maxTries {
		t.Errorf("%d tries", len(k.asked))
	}

	// Replies without an end, and replies without a token.
	for _, body := range []string{"", "{}", "<html>", strings.Repeat("[", 1<<20)} {
		k = newTokens(t)
		k.realm.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, body) })
		if _, err = fetch(t, open(t, k.host(), Options{}), "latest"); err == nil {
			t.Fatalf("%.10q was taken for a token", body)
		}
		t.Log(err)
	}
	k = newTokens(t)
	k.realm.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.asked = append(k.asked, r)
		io.WriteString(w, `{"token":"`)
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("a", 1<<16)); err != nil {
				return
			}
		}
	})
	_, err = fetch(t, open(t, k.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if len(k.asked) != 1 || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("%d tries, %v", len(k.asked), err)
	}
}

func newBasic(t *testing.T, want string) *fake {
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if user, password, _ := r.BasicAuth(); user+":"+password == want {
			return false
		}
		w.Header().Set("Www-Authenticate", `Basic realm="a registry"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	return f
}

func TestBasic(t *testing.T) {
	f := newBasic(t, "me:word")
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:wrong")+`"}}}`)
	_, err = fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
		t.Fatal(err)
	}
}

func TestCredentialHelper(t *testing.T) {
	f := newBasic(t, "me:word")
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	calls := filepath.Join(dir, "calls")
	script := "#!/bin/sh\necho called >>" + calls + "\nread host\n[ \"$host\" = " + f.host() + " ] || { echo 'credentials not found in native keychain'; exit 1; }\n" +
		`echo '{"Username":"me","Secret":"word"}'` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	dockerConfig(t, `{"credHelpers":{"`+f.host()+`":"test"}}`)
	r := open(t, f.host(), Options{})
	for range 3 {
		if _, err := fetch(t, r, "latest"); err != nil {
			t.Fatal(err)
		}
	}
	if b, _ := os.ReadFile(calls); string(b) != "called\n" {
		t.Errorf("the helper was %q", b)
	}
	dockerConfig(t, `{"credsStore":"test"}`)
	if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
		t.Fatal(err)
	}
}

// If a helper is missing or fails, or a config can't be read, there are no credentials.
func TestCredentialTrouble(t *testing.T) {
	for _, config := range []string{`{"credsStore":"is-missing"}`, `{"credsStore":"../../bin/false"}`, `{"auths":`, `{"auths":{"%s":{"auth":"?"}}}`, ``} {
		k := newTokens(t)
		dockerConfig(t, strings.ReplaceAll(config, "%s", k.host()))
		if _, err := fetch(t, open(t, k.host(), Options{}), "latest"); err != nil {
			t.Errorf("anonymous pull with %s: %v", config, err)
		}
	}
	f := newBasic(t, "me:word")
	dockerConfig(t, `{"credsStore":"is-missing"}`)
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if !strings.Contains(err.Error(), "docker-credential-is-missing") {
		t.Errorf("the reason is missing: %v", err)
	}
}

// No secret follows a redirect to another origin. Another port is another origin.
func TestRedirect(t *testing.T) {
	content := noise(1000)
	var got http.Header
	storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header
		http.ServeContent(w, r, "", zero, strings.NewReader(string(content)))
	}))
	t.Cleanup(storage.Close)
	f := newFake(t)
	id := f.blob(content)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("Www-Authenticate", `Basic realm="a registry"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		if r.Header.Get("X-Key") != "secret" {
			t.Error("the configured header is missing")
		}
		http.Redirect(w, r, storage.URL+"/signed?signature=secret", http.StatusTemporaryRedirect)
		return true
	})
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	hosts := t.TempDir()
	writeHosts(t, hosts, "_default", "[header]\nX-Key = 'secret'\n[host.'http://"+f.host()+"'.header]\nx-key = 'secret'\nCookie = 'secret'")
	var debug []string
	r := open(t, f.host(), Options{HostsDir: hosts, Debug: func(s string) { debug = append(debug, s) }})
	if b, err := fetch(t, r, id, "offset:10"); err != nil || string(b) != string(content[10:]) {
		t.Fatal(err)
	}
	for name := range got {
		switch name {
		case "Accept", "Accept-Encoding", "Range", "User-Agent":
		default:
			t.Errorf("the other origin got %s: %s", name, got.Get(name))
		}
	}
	if got.Get("Range") != "bytes=10-" || got.Get("Accept-Encoding") != "identity" {
		t.Errorf("the other origin got %v", got)
	}
	if all := strings.Join(debug, "\n"); strings.Contains(all, "signature") || strings.Contains(all, "secret") || strings.Contains(all, basic("me:word")) {
		t.Errorf("secrets in debug lines:\n%s", all)
	}
}

// An origin that was reached by a redirect gets no credentials, even if it asks for them.
func TestRedirectChallenge(t *testing.T) {
	var got []string
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = append(got, r.Header.Get("Authorization"))
		w.Header().Set("Www-Authenticate", `Basic realm="me too"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	t.Cleanup(evil.Close)
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		http.Redirect(w, r, evil.URL+"/v2/", http.StatusFound)
		return true
	})
	evilHost := strings.TrimPrefix(evil.URL, "http://")
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"},"`+evilHost+`":{"auth":"`+basic("me:word")+`"}}}`)
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	for _, s := range got {
		if s != "" {
			t.Errorf("the other origin got %s", s)
		}
	}
}

func TestRedirectLimits(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	to := ""
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.Header().Set("Location", to)
		w.WriteHeader(http.StatusFound)
		return true
	})
	for _, to = range []string{f.URL + "/v2/x/manifests/again", "file:///etc/passwd", "gopher://localhost/"} {
		f.reset()
		_, err := fetch(t, open(t, f.host(), Options{}), "latest")
		if err == nil || isTemporary(err) || f.count() > maxRedirects {
			t.Errorf("to %s: %v after %d requests", to, err, f.count())
		}
	}
	// Only content that a digest verifies is accepted after a redirect from HTTPS to HTTP.
	plain := newFake(t)
	plain.manifest("latest", ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"layers":[]}`))
	id := plain.blob(noise(10))
	s := newTLSFake(t)
	s.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusFound)
		return true
	})
	r := open(t, s.host(), Options{HostsDir: trusting(t, s)})
	if _, err := fetch(t, r, "latest"); err == nil || !strings.Contains(err.Error(), "redirect") {
		t.Errorf("tag over http: %v", err)
	}
	if _, err := fetch(t, r, id, "mediatype:"+ocispec.MediaTypeImageLayer); err != nil {
		t.Errorf("blob over http: %v", err)
	}
}

// A registry must not be able to send its clients' credentials anywhere it likes.
func TestEvilRealm(t *testing.T) {
	var got []*http.Request
	evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		got = append(got, r)
		fmt.Fprint(w, `{"token":"useless"}`)
	}))
	t.Cleanup(evil.Close)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(evil.URL, "http://"))
	challenge := func(realm string) func(w http.ResponseWriter, r *http.Request, n int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			w.Header().Set("Www-Authenticate", `Bearer realm="`+realm+`",service="s"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
	}
	f := newFake(t)
	for _, config := range []string{`{"auth":"` + basic("me:word") + `"}`, `{"identitytoken":"an-identity"}`} {
		dockerConfig(t, `{"auths":{"`+f.host()+`":`+config+`}}`)
		for _, realm := range []string{"http://0.0.0.0:" + port, "http://169.254.169.254/latest", "http://[64:ff9b::a9fe:a9fe]/latest", "http://[2002:a9fe:a9fe::]/latest", "http://[::ffff:169.254.169.254]/", "file:///etc/passwd"} {
			f.reply(challenge(realm))
			_, err := fetch(t, open(t, f.host(), Options{}), "latest")
			is(t, err, errdefs.IsUnauthorized)
			if len(got) != 0 {
				t.Fatalf("realm %s was asked", realm)
			}
		}
	}
	// TLS is not given up.
	s := newTLSFake(t)
	dockerConfig(t, `{"auths":{"`+s.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	s.reply(challenge(evil.URL))
	_, err := fetch(t, open(t, s.host(), Options{HostsDir: trusting(t, s)}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if len(got) != 0 {
		t.Fatal("a realm without TLS was asked by a registry with it")
	}

	// A token server of another owner gets requests without credentials.
	f.reply(challenge("http://203.0.113.7/token"))
	for _, config := range []string{`{"auth":"` + basic("me:word") + `"}`, `{"identitytoken":"an-identity"}`} {
		dockerConfig(t, `{"auths":{"198.51.100.1:80":`+config+`}}`)
		r := open(t, "198.51.100.1:80", Options{PlainHTTP: true})
		transport := r.clients[0].http.Client.Transport.(roundTripper).RoundTripper.(*http.Transport)
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if strings.HasPrefix(addr, "198.51.100.1:") {
				return net.Dial("tcp", f.host())
			}
			return net.Dial("tcp", strings.TrimPrefix(evil.URL, "http://"))
		}
		_, err = fetch(t, r, "latest")
		is(t, err, errdefs.IsUnauthorized)
		if !strings.Contains(err.Error(), "203.0.113.7") {
			t.Errorf("the reason is missing: %v", err)
		}
	}
	if len(got) == 0 {
		t.Fatal("no anonymous token was asked for")
	}
	for _, r := range got {
		if r.Header.Get("Authorization") != "" || strings.Contains(r.Form.Encode(), "identity") {
			t.Errorf("a realm of another owner got %v %v", r.Header, r.Form)
		}
	}
}

func TestOwnsRealm(t *testing.T) {
	for _, c := range []struct {
		registry, realm string
		want            bool
	}{
		{"registry-1.docker.io", "auth.docker.io", true},
		{"Registry-1.docker.io", "AUTH.docker.io", true},
		{"registry.gitlab.com", "gitlab.com", true},
		{"quay.io", "quay.io", true},
		{"quay.io", "", false},
		{"quay.io", "io", false},
		{"a.quay.io", ".io", false},
		{"quay.io", "auth.quay.io.", false},
		{"us.icr.io", "icr.io", true},
		{"registry.example", "auth.registry.example", true},
		{"registry.digitalocean.com", "api.digitalocean.com", true},
		{"ours.azurecr.io", "theirs.azurecr.io", false},
		{"ours.jfrog.io", "jfrog.io", true},
		{"registry.suse.com", "scc.suse.com", true},
		{"registry.connect.redhat.com", "sso.redhat.com", true},
		{"registry.acme.com", "gitlab.acme.com", true},
		{"registry.ACME.com", "Auth.acme.COM", true},
		{"registry.gitlab.acme.com", "sso.acme.com", true},
		{"registry.acme.co.uk", "auth.acme.co.uk", true},
		{"acme.co.uk", "evil.co.uk", false},
		{"registry.acme.internal", "auth.acme.internal", true},
		{"registry.internal", "auth.internal", false},
		{"registry", "auth", false},
		{"app", "evil.app", false},
		{"acme.github.io", "evil.github.io", false},
		{"acme.github.io", "github.io", false},
		{"acme.a.run.app", "evil.a.run.app", false},
		{"acme.eastus.cloudapp.azure.com", "evil.eastus.cloudapp.azure.com", false},
		{"a.elb.us-east-1.amazonaws.com", "b.elb.us-east-1.amazonaws.com", false},
		{"registry.10.0.0.1.nip.io", "evil.203.0.113.1.nip.io", false},
		{"acme.公司.cn", "evil.公司.cn", false},
		{"registry.acme.com", "acme.com.evil.com", false},
		{"registry.acme.com", "evilacme.com", false},
		{"10.0.0.1", "10.0.0.2", false},
		{"10.0.0.1", "0.0.1", false},
		{"[::1]", "::2", false},
		{"registry.example.co.uk", "uk", false},
		{"registry-1.docker.io", "docker.io.evil.example", false},
		{"registry-1.docker.io", "evildocker.io", false},
		{"127.0.0.1", "127.0.0.1", true},
		{"127.0.0.1", "10.0.0.1", false},
		{"10.1.127.0.0.1", "127.0.0.1", false},
		{"localhost", "example", false},
		{"localhost", "localhost", true},
		{"localhost", "127.0.0.1", true},
		{"registry.localhost", "auth.localhost", true},
		{"localhost", "auth.localhost", true},
		{"registry.acme.com", "auth.localhost", false},
		{"localhost.example", "localhost", false},
	} {
		if got := ownsRealm(c.registry, c.realm); got != c.want {
			t.Errorf("%s and %s: %v", c.registry, c.realm, got)
		}
	}
}
