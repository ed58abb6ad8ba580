package remotes

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// dialing makes a registry's clients connect to servers of the test under other addresses, host:port.
func dialing(r *Registry, servers map[string]string) {
	for _, c := range r.clients {
		transport := c.http.Client.Transport.(roundTripper).RoundTripper.(*http.Transport)
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if to := servers[strings.ToLower(addr)]; to != "" {
				return net.Dial("tcp", to)
			}
			return nil, fmt.Errorf("%s is not of this test", addr)
		}
	}
}

// recorder is a server that records the requests it receives.
type recorder struct {
	*httptest.Server
	mu   sync.Mutex
	all  []string // method, path, header and body of each request
	next http.HandlerFunc
}

func newRecorder(t *testing.T, next http.HandlerFunc) *recorder {
	rec := &recorder{next: next}
	rec.Server = httptest.NewServer(rec)
	t.Cleanup(rec.Close)
	return rec
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	r.mu.Lock()
	r.all = append(r.all, fmt.Sprintln(req.Method, req.URL, req.Header, string(body)))
	r.mu.Unlock()
	req.Body = io.NopCloser(bytes.NewReader(body))
	r.next(w, req)
}

func (r *recorder) host() string { return r.Listener.Addr().String() }

func (r *recorder) seen() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.all, "")
}

// wantsToken is a registry that accepts the token "good", and replies to any other request with the challenge.
func wantsToken(t *testing.T, challenge string) *fake {
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Header.Get("Authorization") == "Bearer good" {
			return false
		}
		w.Header().Set("Www-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	return f
}

// logins is a registry with a token server. It records who requested a token and which token each request had.
type logins struct {
	*fake
	asked, came []string
}

func newLogins(t *testing.T) *logins {
	l := &logins{fake: newFake(t)}
	l.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	l.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path == "/token" {
			user, _, _ := r.BasicAuth()
			l.asked = append(l.asked, user)
			fmt.Fprintf(w, `{"token":"of-%s"}`, user)
			return true
		}
		if user, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer of-"); ok {
			l.came = append(l.came, user)
			return false
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="`+l.URL+`/token",scope="repository:x:pull"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	return l
}

// Secrets of the registry 198.51.100.1, in three forms. No other host may receive any of them.
var secretConfigs = map[string]string{
	"password":       `{"auth":"` + basic("me:S3CRET") + `"}`,
	"identity token": `{"identitytoken":"S3CRET"}`,
	"username":       `{"username":"me","password":"S3CRET"}`,
}

func tellsSecret(s string) bool {
	return strings.Contains(s, "S3CRET") || strings.Contains(s, basic("me:S3CRET")) || strings.Contains(s, "Authorization")
}

// However a challenge spells the token server's address, credentials are sent only to that of the registry itself.
func TestRealmSpellings(t *testing.T) {
	const own, evil = "http://198.51.100.1/token", "http://203.0.113.7/token"
	for name, challenges := range map[string][]string{
		"plain":            {`Bearer realm="` + evil + `"`},
		"duplicate":        {`Bearer realm="` + own + `",realm="` + evil + `"`},
		"in another value": {`Bearer service="realm=` + own + `",realm="` + evil + `"`},
		"escape":           {`Bearer realm="http://203.0.113.\x37/token"`},
		"upper case":       {`Bearer Realm="` + own + `",realm="` + evil + `"`},
		"upper case, last": {`Bearer realm="` + evil + `",REALM="` + own + `"`},
		"spaces":           {`bEARER   realm = "` + evil + `" , service="s"`},
		"no quotes":        {`Bearer realm=` + evil},
		"two headers":      {`Bearer realm="` + own + `"`, `Bearer realm="` + evil + `"`},
		"two, evil first":  {`Bearer realm="` + evil + `"`, `Bearer realm="` + own + `"`},
		"basic before":     {`Basic realm="x", Bearer realm="` + evil + `"`},
		"userinfo":         {`Bearer realm="http://198.51.100.1@203.0.113.7/token"`},
		"password in it":   {`Bearer realm="http://a:b@203.0.113.7/token"`},
		"other port":       {`Bearer realm="http://203.0.113.7:8080/token"`},
		"own redirects":    {`Bearer realm="http://198.51.100.1/redirect"`},
		"own redirects on": {`Bearer realm="http://198.51.100.1/preserve"`},
	} {
		for kind, config := range secretConfigs {
			t.Run(name+"/"+kind, func(t *testing.T) {
				thief := newRecorder(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"useless"}`) })
				f := newFake(t)
				f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
					switch r.URL.Path {
					case "/token":
						fmt.Fprint(w, `{"token":"useless"}`)
					case "/redirect":
						http.Redirect(w, r, evil, http.StatusFound)
					case "/preserve":
						http.Redirect(w, r, evil, http.StatusTemporaryRedirect)
					default:
						w.Header()["Www-Authenticate"] = challenges
						w.WriteHeader(http.StatusUnauthorized)
					}
					return true
				})
				dockerConfig(t, `{"auths":{"198.51.100.1":`+config+`}}`)
				var debug []string
				r := open(t, "198.51.100.1", Options{PlainHTTP: true, Debug: func(s string) { debug = append(debug, s) }})
				dialing(r, map[string]string{"198.51.100.1:80": f.host(), "203.0.113.7:80": thief.host(), "203.0.113.7:8080": thief.host(), "203.0.113.x37:80": thief.host()})
				_, err := fetch(t, r, "latest")
				is(t, err, errdefs.IsUnauthorized)
				got := thief.seen()
				for _, own := range []string{"a:b", "198.51.100.1:"} { // the texts that the registry's own address has
					got = strings.ReplaceAll(got, "Authorization:[Basic "+basic(own), "")
				}
				if tellsSecret(got) {
					t.Errorf("%v\nanother host got\n%s", err, got)
				}
				if all := strings.Join(debug, "\n"); strings.Contains(all, "S3CRET") || strings.Contains(all, basic("me:S3CRET")) || name == "plain" && !strings.Contains(all, "not sent") {
					t.Errorf("debug lines:\n%s", all)
				}
				if got != "" && !strings.Contains(name, "redirects") && !strings.Contains(err.Error(), `realm = ["http://203.0.113.`) {
					t.Errorf("the error does not name the setting: %v", err)
				}
			})
		}
	}
}

// Token servers in hosts.toml get credentials, and an anonymous pull needs no setting.
func TestRealmNamed(t *testing.T) {
	for _, c := range []struct {
		realm  string // in hosts.toml
		config string
		works  bool
	}{
		{"", "", true},
		{"", secretConfigs["password"], false},
		{`realm = ["http://203.0.113.7:5001"]`, secretConfigs["password"], true},
		{`realm = "http://203.0.113.7:5001/auth/token"`, secretConfigs["identity token"], true},
		{`realm = ["http://203.0.113.7", "https://203.0.113.7:5001"]`, secretConfigs["password"], false},
		{`realm = ["http://203.0.113.8:5001"]`, secretConfigs["password"], false},
	} {
		realm := newRecorder(t, func(w http.ResponseWriter, r *http.Request) {
			_, password, _ := r.BasicAuth()
			r.ParseForm()
			if c.config == "" || password == "S3CRET" || r.Method == http.MethodPost {
				fmt.Fprint(w, `{"access_token":"good"}`)
			} else {
				fmt.Fprint(w, `{"token":"anonymous"}`)
			}
		})
		f := wantsToken(t, `Bearer realm="http://203.0.113.7:5001/token",service="s"`)
		config := `{}`
		if c.config != "" {
			config = `{"auths":{"198.51.100.1:5000":` + c.config + `}}`
		}
		dockerConfig(t, config)
		root := t.TempDir()
		writeHosts(t, root, "198.51.100.1_5000_", "server = 'http://198.51.100.1:5000'\n"+c.realm)
		r := open(t, "198.51.100.1:5000", Options{HostsDir: root})
		dialing(r, map[string]string{"198.51.100.1:5000": f.host(), "203.0.113.7:5001": realm.host()})
		_, err := fetch(t, r, "latest")
		if c.works && err != nil {
			t.Errorf("%+v: %v", c, err)
		} else if !c.works {
			is(t, err, errdefs.IsUnauthorized)
			if tellsSecret(realm.seen()) || !strings.Contains(err.Error(), `realm = ["http://203.0.113.7:5001"]`) {
				t.Errorf("%+v: %v\n%s", c, err, realm.seen())
			}
		}
	}
	// An address that a registry elsewhere may not name can be named in this file.
	for _, named := range []bool{false, true} {
		realm := newRecorder(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"good"}`) })
		f := wantsToken(t, `Bearer realm="`+realm.URL+`/token"`)
		root := t.TempDir()
		config := "server = 'http://198.51.100.1'\n"
		if named {
			config += "realm = ['" + realm.URL + "']"
		}
		writeHosts(t, root, "198.51.100.1", config)
		r := open(t, "198.51.100.1", Options{HostsDir: root})
		dialing(r, map[string]string{"198.51.100.1:80": f.host(), realm.host(): realm.host()})
		_, err := fetch(t, r, "latest")
		if named && err != nil {
			t.Error(err)
		} else if !named {
			is(t, err, errdefs.IsUnauthorized)
			if realm.seen() != "" || !strings.Contains(err.Error(), `realm = ["`+realm.URL+`"]`) {
				t.Errorf("%v\n%s", err, realm.seen())
			}
		}
	}
}

// A registry that adds its port to its name, or spells its name in another way, is still the same origin.
func TestUploadLocationOrigin(t *testing.T) {
	content := noise(1000)
	for location, own := range map[string]bool{
		"http://registry.example:80": true, "http://REGISTRY.example": true, "http://registry.example": true, "": true,
		"http://registry.example:8080": false, "http://other.example": false, "http://registry.example.:80": false,
	} {
		f := newFake(t)
		var mu sync.Mutex
		anonymous := 0
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if _, _, ok := r.BasicAuth(); !ok {
				if strings.Contains(r.URL.Path, "/uploads/") && r.Method == http.MethodPut {
					mu.Lock()
					anonymous++
					mu.Unlock()
					if r.Header.Get("X-Key") != "" {
						t.Error("another origin got the configured header")
					}
				}
				w.Header().Set("Www-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			if r.Method == http.MethodPost {
				f.mu.Lock()
				f.uploads["1"] = nil
				f.mu.Unlock()
				w.Header().Set("Location", location+"/v2/x/blobs/uploads/1")
				w.WriteHeader(http.StatusAccepted)
				return true
			}
			return false
		})
		dockerConfig(t, `{"auths":{"registry.example":{"auth":"`+basic("me:word")+`"}}}`)
		root := t.TempDir()
		writeHosts(t, root, "registry.example", "server = 'http://registry.example'\n[header]\nX-Key = 'secret'\n")
		r := open(t, "registry.example", Options{HostsDir: root})
		dialing(r, map[string]string{"registry.example:80": f.host(), "registry.example:8080": f.host(), "other.example:80": f.host(), "registry.example.:80": f.host()})
		_, err := r.Push(context.Background(), digest.FromBytes(content).String(), file(t, content))
		if own && (err != nil || anonymous > 0) {
			t.Errorf("%s: %v after %d requests without credentials", location, err, anonymous)
		} else if !own && (!errdefs.IsUnauthorized(err) || anonymous == 0) {
			t.Errorf("%s: %v", location, err)
		}
	}
	// A port in the locator or in hosts.toml does not make a host a mirror.
	for host, server := range map[string]string{"registry.example:80": "http://registry.example", "registry.example": "http://Registry.example:80", "mirrored.example": "http://registry.example"} {
		f := newFake(t)
		f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
		root := t.TempDir()
		writeHosts(t, root, host, "server = '"+server+"'")
		r := open(t, host, Options{HostsDir: root})
		dialing(r, map[string]string{"registry.example:80": f.host()})
		if _, err := fetch(t, r, "latest"); err != nil {
			t.Fatal(err)
		}
		if got := f.request(0).URL.Query().Has("ns"); got != (host == "mirrored.example") {
			t.Errorf("%s at %s: ns %v", host, server, got)
		}
	}
}

// Only a blob that is read by its digest may come by a redirect from TLS to clear text.
func TestBodiesStayInTLS(t *testing.T) {
	t.Parallel()
	clear := newRecorder(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", digest.FromString(tinyManifest).String())
			io.WriteString(w, tinyManifest)
			return
		}
		w.Header().Set("Location", "/v2/x/blobs/uploads/1")
		w.WriteHeader(http.StatusCreated)
	})
	secure := unstarted()
	redirected := ""
	secure.fault = func(w http.ResponseWriter, r *http.Request, n int) bool {
		if strings.HasPrefix(r.Method+" "+r.URL.Path, redirected) {
			http.Redirect(w, r, clear.URL+r.URL.RequestURI(), http.StatusTemporaryRedirect)
			return true
		}
		return false
	}
	secure.StartTLS()
	t.Cleanup(secure.Close)
	content := []byte("private layer bytes")
	id := digest.FromBytes(content).String()
	locator := func(name string) *Registry {
		t.Helper()
		r, err := Open(secure.host()+"/"+name, Options{HostsDir: trusting(t, secure)})
		if err != nil {
			t.Fatal(err)
		}
		return r.(*Registry)
	}
	manifestID := digest.FromString(tinyManifest).String()
	for what, c := range map[string]struct {
		redirected string
		do         func() error
	}{
		"blob put": {"PUT /v2/x/blobs/uploads/", func() error {
			_, err := locator("x").Push(context.Background(), id, file(t, content))
			return err
		}},
		"blob patched": {"PATCH /v2/x/blobs/uploads/", func() error {
			_, err := locator("x").Push(context.Background(), digest.FromBytes(noise(chunkSize+1)).String(), pipe(t, noise(chunkSize+1)))
			return err
		}},
		"upload begun": {"POST /v2/x/blobs/uploads/", func() error {
			_, err := locator("x").Push(context.Background(), id, file(t, content))
			return err
		}},
		"manifest put": {"PUT /v2/x/manifests/", func() error {
			_, err := locator("x").Push(context.Background(), "new", strings.NewReader(tinyManifest))
			return err
		}},
		"manifest of a repository with blobs in its name": {"", func() error {
			_, err := locator("x/blobs/y").Resolve(context.Background(), "latest")
			return err
		}},
		"manifest by digest": {"GET /v2/x/manifests/", func() error {
			_, err := fetch(t, locator("x"), manifestID, "mediatype:"+ocispec.MediaTypeImageManifest)
			return err
		}},
		"tags of a repository with blobs in its name": {"", func() error {
			for _, err := range locator("x/blobs/sha256").Tags(context.Background()) {
				return err
			}
			return nil
		}},
	} {
		redirected = c.redirected
		if err := c.do(); err == nil || !strings.Contains(err.Error(), "redirect refused") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := clear.seen(); got != "" {
		t.Errorf("in clear text:\n%s", got)
	}
	redirected = "GET /v2/x/blobs/sha256:"
	if b, err := fetch(t, locator("x"), manifestID, "mediatype:"+ocispec.MediaTypeImageLayer); err != nil || string(b) != tinyManifest {
		t.Errorf("a blob by its digest: %q, %v", b, err)
	}
}

// A request with a body follows no redirect to another origin, with TLS or without.
func TestBodyRedirect(t *testing.T) {
	other := newRecorder(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusCreated) })
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.Method == http.MethodPut {
			http.Redirect(w, r, other.URL+r.URL.RequestURI(), http.StatusPermanentRedirect)
		}
		return r.Method == http.MethodPut
	})
	content := noise(1000)
	r := open(t, f.host(), Options{})
	if _, err := r.Push(context.Background(), digest.FromBytes(content).String(), file(t, content)); err == nil || !strings.Contains(err.Error(), "redirect refused") {
		t.Errorf("blob: %v", err)
	}
	if _, err := r.Push(context.Background(), "latest", strings.NewReader(tinyManifest)); err == nil || !strings.Contains(err.Error(), "redirect refused") {
		t.Errorf("manifest: %v", err)
	}
	if got := other.seen(); got != "" {
		t.Errorf("another origin got\n%s", got)
	}
}

// After a redirect to another origin, a redirect back gets no secrets.
func TestRedirectAndBack(t *testing.T) {
	content := noise(1000)
	f := newFake(t)
	back := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, f.URL+"/returned", http.StatusFound)
	}))
	t.Cleanup(back.Close)
	var got []http.Header
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path == "/returned" {
			got = append(got, r.Header)
			w.Write(content)
			return true
		}
		if _, _, ok := r.BasicAuth(); !ok {
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		http.Redirect(w, r, back.URL, http.StatusFound)
		return true
	})
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	root := t.TempDir()
	writeHosts(t, root, "_default", "server = '"+f.URL+"'\n[header]\nX-Key = 'secret'\nCookie = 'secret'\n")
	if _, err := fetch(t, open(t, f.host(), Options{HostsDir: root}), digest.FromBytes(content).String(), "mediatype:"+ocispec.MediaTypeImageLayer); err != nil {
		t.Fatal(err)
	}
	for _, h := range got {
		if h.Get("Authorization") != "" || h.Get("X-Key") != "" || h.Get("Cookie") != "" {
			t.Errorf("sent back with %v", h)
		}
	}
	if len(got) == 0 {
		t.Error("it was not sent back")
	}
}

// If the registry refuses a token that another process got, and has no challenge in its reply, the token is dropped for
// all processes, and the request is repeated without one.
func TestSharedTokenRefused(t *testing.T) {
	shared := runtimeDir(t)
	valid, given := "", 0
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path == "/token" {
			given++
			valid = fmt.Sprintf("token-%d", given)
			fmt.Fprintf(w, `{"token":%q}`, valid)
			return true
		}
		got := r.Header.Get("Authorization")
		if got == "Bearer "+valid {
			return false
		}
		if got == "" {
			w.Header().Set("Www-Authenticate", `Bearer realm="`+f.URL+`/token",scope="repository:x:pull"`)
		}
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	long := open(t, f.host(), Options{}) // a process that runs for long, and has its own token
	for i, r := range []*Registry{open(t, f.host(), Options{}), long, open(t, f.host(), Options{}), long, open(t, f.host(), Options{})} {
		if i > 1 {
			valid = "none"
		}
		if _, err := fetch(t, r, "latest"); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if given != 4 {
		t.Errorf("%d tokens were asked for", given)
	}
	// If the registry still refuses the token, one more is requested, and then none.
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if f.count() != 2 {
		t.Errorf("%d requests: %q", f.count(), f.seen())
	}
	files, _ := filepath.Glob(filepath.Join(shared, "token-*"))
	for _, name := range files {
		if b, _ := os.ReadFile(name); len(b) > 0 {
			t.Errorf("kept: %s", b)
		}
	}
}

// A token is bound to the credential with which it was requested, even if that comes from a helper.
func TestSharedTokenOfLogin(t *testing.T) {
	runtimeDir(t)
	f := newLogins(t)
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("HELPER_USER", "")
	script := "#!/bin/sh\ncat >/dev/null\n" + `[ "$HELPER_USER" ] || { echo "credentials not found in native keychain"; exit 1; }` + "\n" +
		`echo "{\"Username\":\"$HELPER_USER\",\"Secret\":\"word\"}"` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-test"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	dockerConfig(t, `{"credsStore":"test"}`)
	want := []string{"alice", "alice", "bob", "bob", "", "alice"}
	for _, user := range want {
		os.Setenv("HELPER_USER", user)
		if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
			t.Fatal(err)
		}
	}
	if fmt.Sprint(f.came) != fmt.Sprint(want) || len(f.asked) != 4 {
		t.Errorf("they came as %q, with tokens of %q", f.came, f.asked)
	}
}

// If the repository in a mount: hint is not accessible for this user, the blob is uploaded and the push succeeds.
func TestMountScopeRefused(t *testing.T) {
	content := noise(1000)
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path == "/token" {
			if strings.Contains(fmt.Sprint(r.URL.Query()["scope"]), "secret/base") {
				w.WriteHeader(http.StatusForbidden)
			} else {
				fmt.Fprint(w, `{"token":"good"}`)
			}
			return true
		}
		if r.Header.Get("Authorization") == "Bearer good" && !r.URL.Query().Has("mount") {
			return false
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="`+f.URL+`/token"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	got, err := open(t, f.host(), Options{}).Push(context.Background(), digest.FromBytes(content).String(), file(t, content), "mediatype:"+ocispec.MediaTypeImageLayer, "mount:secret/base")
	if err != nil || got.State != Stored || !bytes.Equal(f.blobs[digest.FromBytes(content)], content) {
		t.Errorf("%+v, %v", got, err)
	}
}

// A pause is for the origin and login that was asked to wait. It does not stop requests to the registry when only its
// storage is busy, nor those of another login.
func TestSharedWaitOfOthers(t *testing.T) {
	runtimeDir(t)
	busy := newRecorder(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	f := newFake(t)
	f.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	id := f.blob(noise(10))
	limited := false
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if _, _, ok := r.BasicAuth(); !ok && limited {
			w.Header().Set("Retry-After", "120")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
		if strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, busy.URL, http.StatusFound)
			return true
		}
		return false
	})
	_, err := fetch(t, open(t, f.host(), Options{}), id, "mediatype:"+ocispec.MediaTypeImageLayer)
	is(t, err, errdefs.IsAborted)
	if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
		t.Errorf("beside busy storage: %v", err)
	}
	limited = true
	for range 2 {
		_, err = fetch(t, open(t, f.host(), Options{MaxWait: time.Second}), "latest")
		is(t, err, errdefs.IsResourceExhausted)
	}
	seen := f.count()
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	_, err = fetch(t, open(t, f.host(), Options{MaxWait: time.Second}), "latest")
	if f.count() == seen {
		t.Errorf("another login was not tried: %v", err)
	}
}

// names makes the test's names resolve to addresses, and no others.
func names(t testing.TB, addresses map[string]string) {
	old := lookupNetIP
	lookupNetIP = func(_ context.Context, _, host string) ([]netip.Addr, error) {
		if a := addresses[host]; a != "" {
			return []netip.Addr{netip.MustParseAddr(a)}, nil
		}
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	t.Cleanup(func() { lookupNetIP = old })
}

// The address of a token server is checked, whatever its name. A registry elsewhere may not send its clients to this
// machine. A registry on this machine may, but its clients send no credentials.
func TestRealmAddress(t *testing.T) {
	names(t, map[string]string{"localhost": "127.0.0.1", "far.example": "198.51.100.1", "registry.test": "127.0.0.1", "auth.test": "127.0.0.1", "metadata.example": "169.254.169.254", "sso.example": "10.1.2.3",
		"registry.far.example": "198.51.100.1", "auth.far.example": "127.0.0.1", "sso.far.example": "10.1.2.3"})
	for _, c := range []struct {
		registry, realm string
		config          string
		asked, works    bool
	}{
		{"far.example", "http://auth.test:5001", "{}", false, false},
		{"far.example", "http://localhost:5001", "{}", false, false},
		{"far.example", "http://metadata.example:5001", "{}", false, false},
		{"far.example", "http://sso.example:5001", "{}", true, true},
		{"far.example", "http://unknown.example:5001", "{}", true, true},
		{"registry.far.example", "http://auth.far.example:5001", "{}", false, false},
		{"registry.far.example", "http://auth.far.example:5001", secretConfigs["password"], false, false},
		{"registry.far.example", "http://sso.far.example:5001", secretConfigs["password"], true, true},
		{"registry.far.example", "http://new.far.example:5001", secretConfigs["password"], true, true},
		{"registry.test", "http://auth.test:5001", "{}", true, true},
		{"registry.test", "http://127.0.0.1:5001", "{}", true, true},
		{"registry.test", "http://metadata.example:5001", "{}", false, false},
		{"registry.test", "http://auth.test:5001", secretConfigs["password"], true, true},
		{"registry.test", "http://registry.test:5001", secretConfigs["password"], true, true},
	} {
		realm := newRecorder(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"good"}`) })
		f := wantsToken(t, `Bearer realm="`+c.realm+`/token"`)
		dockerConfig(t, `{"auths":{"`+c.registry+`":`+c.config+`}}`)
		r := open(t, c.registry, Options{PlainHTTP: true})
		dialing(r, map[string]string{c.registry + ":80": f.host(), strings.TrimPrefix(c.realm, "http://"): realm.host()})
		_, err := fetch(t, r, "latest")
		if (err == nil) != c.works || (realm.seen() != "") != c.asked {
			t.Errorf("%s, token server %s: %v\n%s", c.registry, c.realm, err, realm.seen())
		}
		if err != nil && (!errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), `realm = ["`+c.realm+`"]`)) {
			t.Error(err)
		}
		if c.config != "{}" && c.asked && tellsSecret(realm.seen()) != ownsRealm(c.registry, strings.Split(c.realm[7:], ":")[0]) {
			t.Errorf("%s, token server %s got\n%s", c.registry, c.realm, realm.seen())
		}
	}
}

// A challenge with an invalid address of a token server is a refusal, and not a temporary failure.
func TestRealmIsNoAddress(t *testing.T) {
	for _, realm := range []string{"", "token", "http://", "http:///token", "//203.0.113.7/token", "http://203.0.113.%37/token", "http://a b/token", "http://[::1/token", "file:///token"} {
		f := wantsToken(t, `Bearer realm="`+realm+`"`)
		dockerConfig(t, `{"auths":{"`+f.host()+`":`+secretConfigs["password"]+`}}`)
		_, err := fetch(t, open(t, f.host(), Options{}), "latest")
		if !errdefs.IsUnauthorized(err) || isTemporary(err) || f.count() != 1 {
			t.Errorf("%q: %v, after %d requests", realm, err, f.count())
		}
	}
}

// Of a reply that is not HTTP, the error quotes only a part.
func TestMalformedReply(t *testing.T) {
	f := newFake(t)
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return true
		}
		defer conn.Close()
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nX\x1b[31m: %s\r\n\r\n", strings.Repeat("y", 100_000))
		return true
	})
	_, err := fetch(t, open(t, f.host(), Options{}), "latest")
	if err == nil || len(err.Error()) > 2*maxErrorText || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("%.400q", err)
	}
}

// The default port in a redirect does not make another origin.
func TestWasRedirected(t *testing.T) {
	for to, want := range map[string]bool{"http://R.example:80/x": false, "https://r.example/x": false, "http://r.example:81/x": true, "https://cdn.example/x": true} {
		first, last := httptest.NewRequest("GET", "http://r.example/x", nil), httptest.NewRequest("GET", to, nil)
		last.Response = &http.Response{Request: first}
		if got := wasRedirected(&http.Response{Request: last}); got != want {
			t.Errorf("%s: %v", to, got)
		}
	}
}

// A registry that is reached by HTTP, and redirects to HTTPS on the same host, is still the same origin.
func TestUpgradeToTLS(t *testing.T) {
	secure := unstarted()
	secure.manifest("latest", ocispec.MediaTypeImageManifest, []byte(tinyManifest))
	challenge := ""
	asked := 0
	secure.fault = func(w http.ResponseWriter, r *http.Request, n int) bool {
		if r.URL.Path == "/token" {
			asked++
			if _, password, _ := r.BasicAuth(); password == "S3CRET" {
				fmt.Fprint(w, `{"token":"good"}`)
				return true
			}
		}
		if _, password, _ := r.BasicAuth(); password == "S3CRET" || r.Header.Get("Authorization") == "Bearer good" {
			return false
		}
		w.Header().Set("Www-Authenticate", challenge)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	secure.StartTLS() // its certificate is for example.com
	t.Cleanup(secure.Close)
	thief := newRecorder(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"useless"}`) })
	var clear []http.Header
	plain := newRecorder(t, func(w http.ResponseWriter, r *http.Request) {
		clear = append(clear, r.Header)
		http.Redirect(w, r, "https://example.com"+r.URL.RequestURI(), http.StatusPermanentRedirect)
	})
	root := t.TempDir()
	writeHosts(t, root, "example.com", "server = 'http://example.com'\nca = 'ca.pem'")
	certificate(t, secure, filepath.Join(root, "example.com", "ca.pem"))
	dockerConfig(t, `{"auths":{"example.com":`+secretConfigs["password"]+`}}`)
	for c, works := range map[string]bool{`Basic realm="x"`: true, `Bearer realm="https://example.com/token"`: true, `Bearer realm="http://203.0.113.7/token"`: false, `Bearer realm="https://203.0.113.7/token"`: false} {
		challenge = c
		r := open(t, "example.com", Options{HostsDir: root})
		dialing(r, map[string]string{"example.com:80": plain.host(), "example.com:443": secure.host(), "203.0.113.7:80": thief.host(), "203.0.113.7:443": thief.host()})
		_, err := fetch(t, r, "latest")
		if (err == nil) != works {
			t.Errorf("%s: %v", c, err)
		}
		if _, err := r.Push(context.Background(), "latest", strings.NewReader(tinyManifest), "mediatype:"+ocispec.MediaTypeImageManifest); works && (err != nil || secure.manifests["latest"].mediaType == "") {
			t.Errorf("%s: put: %v, as %q", c, err, secure.manifests["latest"].mediaType)
		}
		r.Push(context.Background(), digest.FromString("1").String(), strings.NewReader("1"), "mediatype:"+ocispec.MediaTypeImageLayer)
	}
	for _, h := range clear {
		if h.Get("Authorization") != "" {
			t.Errorf("in clear text: %v", h)
		}
	}
	if tellsSecret(thief.seen()) {
		t.Errorf("another host got\n%s", thief.seen())
	}
}

// FuzzSecrets is a registry that sends challenges and redirects of any kind. The credential may only be sent with TLS
// to its own host, or to one below or above it.
func FuzzSecrets(f *testing.F) {
	names(f, nil)
	for _, challenge := range []string{`Bearer realm="https://registry.example/token"`, `Bearer realm="https://r.evil/t",realm="https://registry.example/token"`, `Bearer realm="https://registry.example/token?next",scope="repository:x:pull"`, `Basic realm="x"`, "Bearer realm=https://r.evil", `Bearer realm="https:"`} {
		for _, location := range []string{"", "https://r.evil/", "//r.evil/", "http://registry.example/", "https://registry.example:443/v2/", "https://registry.example@r.evil/", "/v2/x/blobs/uploads/1"} {
			f.Add(challenge, location, false)
			f.Add(challenge, location, true)
		}
	}
	f.Fuzz(func(t *testing.T, challenge, location string, identity bool) {
		k := &keyring{}
		k.add("auth.json", []byte(`{"auths":{"registry.example":`+secretConfigs[map[bool]string{false: "password", true: "identity token"}[identity]]+`}}`))
		c := newClient(endpoint{scheme: "https", host: "registry.example", path: "/v2", capabilities: canAll, header: http.Header{"X-Key": {"S3CRET"}}}, Options{}, k.login("https", "registry.example", "x"))
		c.shared, c.pause = "", time.Microsecond
		reply := func(req *http.Request, status int, name, value, body string) *http.Response {
			return &http.Response{StatusCode: status, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{name: {value}}, Body: io.NopCloser(strings.NewReader(body)), Request: req}
		}
		c.http.Client.Transport = roundTripper{transportFunc(func(req *http.Request) (*http.Response, error) {
			body := ""
			if req.Body != nil {
				b, _ := io.ReadAll(req.Body)
				req.Body.Close()
				body = string(b)
			}
			host := strings.ToLower(req.URL.Hostname())
			isOurs := req.URL.Scheme == "https" && (host == "registry.example" || strings.HasSuffix(host, ".registry.example"))
			auth := req.Header.Get("Authorization")
			if own := req.URL.User; own != nil {
				password, _ := own.Password()
				if auth == "Basic "+basic(own.Username()+":"+password) {
					auth = ""
				}
			}
			if !isOurs && (auth != "" || strings.Contains(fmt.Sprint(req.Header, body), "S3CRET")) {
				t.Errorf("%s %s got %v %s", req.Method, req.URL, req.Header, body)
			}
			if origin(req.URL) != "https://registry.example:443" && req.Header.Get("X-Key") != "" {
				t.Errorf("%s got the configured header", req.URL)
			}
			switch {
			case strings.HasPrefix(req.URL.Path, "/v2/") && req.Header.Get("Authorization") == "":
				return reply(req, http.StatusUnauthorized, "Www-Authenticate", challenge, ""), nil
			case location != "" && (strings.HasPrefix(req.URL.Path, "/v2/") || strings.HasPrefix(req.URL.RawQuery, "next")):
				return reply(req, http.StatusTemporaryRedirect, "Location", location, ""), nil
			}
			return reply(req, http.StatusOK, "Content-Type", "application/json", `{"token":"token"}`), nil
		}), c}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for _, req := range []request{
			{method: http.MethodGet, path: "/x/manifests/latest", scopes: []string{"repository:x:pull"}},
			{method: http.MethodPut, path: "/x/manifests/latest", body: func() io.Reader { return strings.NewReader("S3CRET") }, size: 6},
		} {
			if resp, err := c.do(ctx, req, c.newTries(2)); err == nil {
				resp.Body.Close()
			}
		}
	})
}

type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }
