package remotes

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Credentials are stored only if the registry accepts them. Then they are found, and then removed.
func TestLoginAndOut(t *testing.T) {
	for name, newRegistry := range map[string]func() *fake{
		"basic": func() *fake { return newBasic(t, "me:word") },
		"token": func() *fake { // the token server checks the credentials; the registry accepts any token
			f := newFake(t)
			f.manifest("latest", "application/vnd.oci.image.manifest.v1+json", []byte(tinyManifest))
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				user, password, _ := r.BasicAuth()
				switch {
				case r.URL.Path == "/token" && user+":"+password == "me:word":
					fmt.Fprint(w, `{"token":"t"}`)
				case r.URL.Path == "/token" || r.Header.Get("Authorization") != "Bearer t":
					w.Header().Set("Www-Authenticate", `Bearer realm="`+f.URL+`/token"`)
					w.WriteHeader(http.StatusUnauthorized)
				default:
					return r.URL.Path == "/v2/"
				}
				return true
			})
			return f
		},
		"open door": func() *fake { // the registry needs no credentials, but checks those that it gets
			f := newBasic(t, "me:word")
			inner := f.fault
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				if _, _, named := r.BasicAuth(); r.URL.Path == "/v2/" && !named {
					return true
				}
				return inner(w, r, n)
			})
			return f
		},
	} {
		t.Run(name, func(t *testing.T) {
			runtimeDir(t)
			f := newRegistry()
			inner := f.fault
			f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
				return inner(w, r, n) || r.URL.Path == "/v2/"
			})
			file := filepath.Join(t.TempDir(), "new", "auth.json")
			o := Options{AuthFile: file, HostsDir: t.TempDir()}
			_, err := Login(context.Background(), f.host(), o, "me", "S3CRET")
			is(t, err, errdefs.IsUnauthorized)
			if _, serr := os.Stat(file); serr == nil || strings.Contains(err.Error(), "S3CRET") {
				t.Errorf("%v; a refused password is stored: %v", err, serr)
			}
			for range 2 {
				if place, err := Login(context.Background(), f.host(), o, "me", "word"); err != nil || place != file {
					t.Fatal(place, err)
				}
			}
			info, err := os.Stat(file)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Fatal(info.Mode(), err)
			}
			if _, err := fetch(t, open(t, f.host(), o), "latest"); err != nil {
				t.Error(err)
			}
			if places, err := Logout(context.Background(), f.host(), o); err != nil || len(places) != 1 || places[0] != file {
				t.Fatal(places, err)
			}
			_, err = Logout(context.Background(), f.host(), o)
			is(t, err, errdefs.IsNotFound)
			_, err = fetch(t, open(t, f.host(), o), "latest")
			is(t, err, errdefs.IsUnauthorized)
		})
	}
}

// Everything outside the entry stays the same, byte for byte. Other spellings of the host are removed, and a symbolic
// link stays a link.
func TestLoginKeepsTheFile(t *testing.T) {
	t.Parallel()
	f := newBasic(t, "me:word")
	inner := f.fault
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		return inner(w, r, n) || r.URL.Path == "/v2/"
	})
	dir := t.TempDir()
	file := filepath.Join(dir, "dotfiles.json")
	link := filepath.Join(dir, "config.json")
	if err := os.Symlink("dotfiles.json", link); err != nil {
		t.Fatal(err)
	}
	entry := `{"auth":"` + basic("me:word") + `"}`
	for _, c := range []struct{ before, after, out string }{
		{"", "{\n\t\"auths\": {\n\t\t\"HOST\": ENTRY\n\t}\n}\n", "{\n\t\"auths\": {}\n}\n"},
		{"{}", "{\n\t\"auths\": {\n\t\t\"HOST\": ENTRY\n\t}\n}", "{\n\t\"auths\": {}\n}"},
		{`{"auths":null}`, "{\"auths\":{\n\t\t\"HOST\": ENTRY\n\t}}", `{"auths":{}}`},
		{"{ \"z\": 1.50,\n  \"auths\" : {\"a&b\": {\"auth\":\"x\"} ,  \"https://HOST/v1/\":{}, \"HOST\": 7},\"é\\u0026\":[1, 2]}\n\n",
			"{ \"z\": 1.50,\n  \"auths\" : {\"a&b\": {\"auth\":\"x\"},\"HOST\": ENTRY},\"é\\u0026\":[1, 2]}\n\n",
			"{ \"z\": 1.50,\n  \"auths\" : {\"a&b\": {\"auth\":\"x\"}},\"é\\u0026\":[1, 2]}\n\n"},
		{"{\n    \"auths\": {\n        \"HOST\": {},\n        \"b\": {}\n    },\n    \"credHelpers\": {\"b\": \"c\"}\n}\n",
			"{\n    \"auths\": {\n        \"b\": {},\n        \"HOST\": ENTRY\n    },\n    \"credHelpers\": {\"b\": \"c\"}\n}\n",
			"{\n    \"auths\": {\n        \"b\": {}\n    },\n    \"credHelpers\": {\"b\": \"c\"}\n}\n"},
	} {
		fill := func(s string) string { return strings.NewReplacer("HOST", f.host(), "ENTRY", entry).Replace(s) }
		if err := os.WriteFile(file, []byte(fill(c.before)), 0o644); err != nil {
			t.Fatal(err)
		}
		o := Options{AuthFile: link, HostsDir: t.TempDir()}
		if _, err := Login(context.Background(), f.host(), o, "me", "word"); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(file)
		if err != nil || string(got) != fill(c.after) || !json.Valid(got) {
			t.Errorf("%v\n%s\nbecame\n%s\nnot\n%s", err, fill(c.before), got, fill(c.after))
		}
		if _, err := Logout(context.Background(), f.host(), o); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(file); string(got) != fill(c.out) {
			t.Errorf("after the logout\n%s\nnot\n%s", got, fill(c.out))
		}
		if to, err := os.Readlink(link); err != nil || to != "dotfiles.json" {
			t.Errorf("the link is %q, %v", to, err)
		}
	}
	for _, bad := range []string{"[]", "{", `{"auths":7}`, `{"auths":{"x":S3CRET}}`, "{} x"} {
		if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Login(context.Background(), f.host(), Options{AuthFile: link, HostsDir: t.TempDir()}, "me", "word")
		if got, _ := os.ReadFile(file); err == nil || string(got) != bad || strings.Contains(err.Error(), "S3CRET") {
			t.Errorf("%s: %v, %s", bad, err, got)
		}
	}
	_, err := Login(context.Background(), f.host(), Options{AuthFile: os.DevNull, HostsDir: t.TempDir()}, "me", "word")
	is(t, err, errdefs.IsInvalidArgument)
}

// When several logins run at the same time, no entry is lost.
func TestLoginsAtOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "auth.json")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			a := account{key: fmt.Sprint("h", i), prefix: fmt.Sprint("h", i, ":443"), endpoint: endpoint{scheme: "https"}}
			if _, err := a.store(context.Background(), file, auth.Credential{Username: "me", Password: "word"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	b, err := os.ReadFile(file)
	var f authFile
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if left, _ := os.ReadDir(filepath.Dir(file)); err != nil || len(f.Auths) != 20 || len(left) != 1 {
		t.Errorf("%d entries, %d files: %v", len(f.Auths), len(left), err)
	}
}

// The helper that is configured for the host stores the credentials, and removes them.
func TestLoginByHelper(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("KEPT", filepath.Join(dir, "kept"))
	script := `#!/bin/sh
case $1 in
store) cat >"$KEPT" ;;
get) read -r server || [ "$server" ] && grep -q "\"ServerURL\":\"$server\"" "$KEPT" 2>/dev/null && cat "$KEPT" || { echo "credentials not found in native keychain"; exit 1; } ;;
erase) rm "$KEPT" ;;
esac
`
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-kept"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, config := range []string{`{"credsStore":"kept"}`, `{"credHelpers":{"%s":"kept"},"auths":{"%s":{"auth":"` + basic("old:pw") + `"}}}`} {
		f := newBasic(t, "me:word")
		inner := f.fault
		f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
			return inner(w, r, n) || r.URL.Path == "/v2/"
		})
		dockerConfig(t, strings.ReplaceAll(config, "%s", f.host()))
		file := filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json")
		o := Options{HostsDir: t.TempDir()}
		if place, err := Login(context.Background(), f.host(), o, "me", "word"); err != nil || place != "docker-credential-kept" {
			t.Fatal(place, err)
		}
		b, _ := os.ReadFile(file)
		var kept authFile
		if json.Unmarshal(b, &kept); string(kept.Auths[f.host()]) != "{}" {
			t.Errorf("the file has %s", b)
		}
		if _, err := fetch(t, open(t, f.host(), o), "latest"); err != nil {
			t.Error(err)
		}
		if places, err := Logout(context.Background(), f.host(), o); err != nil || len(places) != 1 {
			t.Fatal(places, err)
		}
		_, err := Logout(context.Background(), f.host(), o)
		is(t, err, errdefs.IsNotFound)
	}
	f := newBasic(t, "me:word")
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool { return r.URL.Path == "/v2/" })
	dockerConfig(t, `{"credsStore":"missing"}`)
	_, err := Login(context.Background(), f.host(), Options{HostsDir: t.TempDir()}, "me", "word")
	if err == nil || !strings.Contains(err.Error(), "docker-credential-missing") {
		t.Error(err)
	}
}

func TestAccounts(t *testing.T) {
	for _, c := range []struct{ name, key, prefix string }{
		{"docker.io", dockerHubServer, "docker.io:443"},
		{"index.docker.io", dockerHubServer, "docker.io:443"},
		{"docker.io/me", "docker.io/me", "docker.io:443/me"},
		{"h.example", "h.example", "h.example:443"},
		{"h.example/", "h.example", "h.example:443"},
		{"h.example:5000/team/x", "h.example:5000/team/x", "h.example:5000/team/x"},
		{"localhost:5000", "localhost:5000", "localhost:5000"},
	} {
		a, err := newAccount(c.name, Options{HostsDir: t.TempDir()})
		if err != nil || a.key != c.key || a.prefix != c.prefix {
			t.Errorf("%s: %+v, %v", c.name, a, err)
		}
		if got := userOf(t, `{"auths":{"`+a.key+`":{"auth":"`+basic("found:pw")+`"}}}`, a.scheme, a.host, "team/x"); got != "found" && c.name != "docker.io/me" {
			t.Errorf("%s is not found again", a.key)
		}
	}
	for _, bad := range []string{"", "/", "x", "./x", "https://h.example", "h.example/X", "http::x", "h.example/x:1"} {
		_, err := newAccount(bad, Options{HostsDir: t.TempDir()})
		is(t, err, errdefs.IsInvalidArgument)
	}
	for _, c := range [][2]string{{"", "p"}, {"u", ""}, {"u:v", "p"}, {"u", "p\nq"}, {"u\x00", "p"}} {
		_, err := Login(context.Background(), "h.example", Options{HostsDir: t.TempDir()}, c[0], c[1])
		is(t, err, errdefs.IsInvalidArgument)
	}
}

// The header is the one that the registry was asked with: with a token for the scopes, a password, or without either.
func TestAuthorization(t *testing.T) {
	var scopes []string
	tokens := newFake(t)
	tokens.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		switch {
		case r.URL.Path == "/token":
			scopes = r.URL.Query()["scope"]
			fmt.Fprint(w, `{"token":"t"}`)
		case r.Header.Get("Authorization") != "Bearer t":
			w.Header().Set("Www-Authenticate", `Bearer realm="`+tokens.URL+`/token"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			w.WriteHeader(http.StatusForbidden) // a token for a repository does not give access to /v2/
		}
		return true
	})
	o := Options{HostsDir: t.TempDir()}
	for want, asked := range map[string][]string{
		"repository:x:pull":                                nil,
		"repository:x:pull,push":                           {"push,pull"},
		"registry:catalog:*":                               {"registry:catalog:*"},
		"repository:other/y:pull repository:x:delete,pull": {"pull,delete", "repository:other/y:pull"},
	} {
		got, err := Authorization(context.Background(), tokens.host()+"/x", o, asked...)
		if err != nil || got != "Bearer t" || strings.Join(scopes, " ") != want {
			t.Errorf("%q: %q, %v, scopes %q", asked, got, err, scopes)
		}
	}
	for _, bad := range []string{"", "pull push", "a\nb", `repository:x":pull`} {
		_, err := Authorization(context.Background(), tokens.host()+"/x", o, bad)
		is(t, err, errdefs.IsInvalidArgument)
	}
	f := newBasic(t, "me:word")
	_, err := Authorization(context.Background(), f.host()+"/x", o)
	is(t, err, errdefs.IsUnauthorized)
	dockerConfig(t, `{"auths":{"`+f.host()+`":{"auth":"`+basic("me:word")+`"}}}`)
	if got, err := Authorization(context.Background(), f.host()+"/x", o); err != nil || got != "Basic "+basic("me:word") {
		t.Error(got, err)
	}
	// /v2/ needs no credentials, but the repository does.
	inner := f.fault
	f.reply(func(w http.ResponseWriter, r *http.Request, n int) bool {
		return r.URL.Path == "/v2/" || inner(w, r, n)
	})
	if got, err := Authorization(context.Background(), f.host()+"/x", o); err != nil || got != "Basic "+basic("me:word") {
		t.Error(got, err)
	}
	if got, err := Authorization(context.Background(), newFake(t).host()+"/x", o); err != nil || got != "" {
		t.Error(got, err)
	}
	_, err = Authorization(context.Background(), "./x", o)
	is(t, err, errdefs.IsNotImplemented)
	// If credentials may not be sent to the token server, it issues an anonymous token. The caller asked for more than
	// that.
	thief := newRecorder(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"token":"nobody's"}`) })
	far := wantsToken(t, `Bearer realm="`+thief.URL+`/token"`)
	dockerConfig(t, `{"auths":{"registry.example":{"auth":"`+basic("me:S3CRET")+`"}}}`)
	r := open(t, "registry.example", Options{PlainHTTP: true})
	dialing(r, map[string]string{"registry.example:80": far.host()})
	if got, err := r.authorization(context.Background(), []string{"repository:x:pull"}); !errdefs.IsUnauthorized(err) || tellsSecret(thief.seen()) {
		t.Error(got, err)
	}
}
