package remotes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// auths writes the entries of an auth file, each with the name of its user.
func auths(users map[string]string) string {
	m := map[string]any{}
	for key, user := range users {
		m[key] = map[string]string{"auth": basic(user + ":pw")}
	}
	b, _ := json.Marshal(map[string]any{"auths": m})
	return string(b)
}

func userOf(t *testing.T, content, scheme, host, repository string) string {
	t.Helper()
	k := &keyring{}
	k.add("auth.json", []byte(content))
	c, err := k.login(scheme, host, repository).credential(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return c.Username
}

// The longest prefix of the repository takes precedence, and the host comes last. Credentials for another path are
// never sent.
func TestCredentialOfRepository(t *testing.T) {
	for _, c := range []struct {
		keys             string // each may have "=" and the user's name
		host, repository string
		want             string
	}{
		{"h.example=host", "h.example", "a/b/c", "host"},
		{"h.example=host h.example/a=a h.example/a/b=ab", "h.example", "a/b/c", "ab"},
		{"h.example=host h.example/a=a h.example/a/b=ab", "h.example", "a/b", "ab"},
		{"h.example=host h.example/a=a h.example/a/b=ab", "h.example", "a/x", "a"},
		{"h.example=host h.example/a=a h.example/a/b=ab", "h.example", "ab/b", "host"},
		{"h.example/a=a h.example/b=b", "h.example", "a/x", "a"},
		{"h.example/a=a h.example/b=b", "h.example", "c/x", ""},
		{"h.example/a=a h.example/b=b", "h.example", "aa", ""},
		{"h.example/a=a", "h.example:5000", "a/x", ""},
		{"h.example:5000/a=a h.example=host", "h.example:5000", "a/x", "a"},
		{"https://h.example/team=team", "h.example", "x", ""},
		{"https://h.example/team=team", "h.example", "team/x", "team"},
		{"https://h.example/v2/=old", "h.example", "x", "old"},
		{"https://H.example=old", "h.example", "x", "old"},
		{"http://h.example/v1/=old h.example=new", "h.example", "x", "new"},
		{"h.example:443=tls", "h.example", "x", "tls"},
		{"h.example=tls", "h.example:443", "x", "tls"},
		{"h.example:80=clear", "h.example", "x", ""},
		{"docker.io=hub", "h.example", "x", ""},
		{"docker.io.evil.example=evil evildocker.io=evil", "registry-1.docker.io", "x", ""},
		{"docker.io/me=me docker.io=hub", "registry-1.docker.io", "me/x", "me"},
		{"docker.io/me=me https://index.docker.io/v1/=hub", "registry-1.docker.io", "library/x", "hub"},
		{"docker.io=hub", "docker.io.evil.example", "x", ""},
	} {
		users := map[string]string{}
		for _, entry := range strings.Fields(c.keys) {
			key, user, _ := strings.Cut(entry, "=")
			users[key] = user
		}
		for range 10 { // maps have a different order each time
			if got := userOf(t, auths(users), "https", c.host, c.repository); got != c.want {
				t.Fatalf("%s: %s/%s gets %q, not %q", c.keys, c.host, c.repository, got, c.want)
			}
		}
	}
	if got := userOf(t, auths(map[string]string{"h.example": "plain"}), "http", "h.example:80", "x"); got != "plain" {
		t.Errorf("port 80 of HTTP: %q", got)
	}
	for _, key := range []string{"docker.io", "index.docker.io", "registry-1.docker.io", "https://docker.io", "https://index.docker.io", "https://index.docker.io/v1/",
		"index.docker.io/v1/", "https://registry-1.docker.io/v2/", "http://docker.io/", "Docker.io", "docker.io:443"} {
		if got := userOf(t, auths(map[string]string{key: "hub"}), "https", "registry-1.docker.io", "library/x"); got != "hub" {
			t.Errorf("%s: %q", key, got)
		}
	}
	// An entry without a credential is skipped. For an entry that can't be read there is an error, which has nothing of
	// its text.
	content := `{"auths":{"h.example/a":{},"h.example/a/b":{"auth":"` + basic("S3CRET-without-colon") + `"},"h.example":{"auth":"` + basic("host:pw") + `"}}}`
	if got := userOf(t, content, "https", "h.example", "a/b"); got != "host" {
		t.Errorf("past an empty entry: %q", got)
	}
	for _, content := range []string{content, `{"auths":{"h.example":"S3CRET"}}`, `{"auths":"S3CRET`, `{"credsStore":["S3CRET"]}`} {
		k := &keyring{}
		k.add("auth.json", []byte(content))
		if k.login("https", "h.example", "a/b"); k.readError == "" || strings.Contains(k.readError, "S3CRET") || strings.Contains(k.readError, basic("S3CRET-without-colon")) {
			t.Errorf("told: %q", k.readError)
		}
	}
}

// Helpers are asked for the names under which docker and podman store credentials. Entries with a longer prefix come
// first.
func TestCredentialHelperNames(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	log := filepath.Join(dir, "log")
	t.Setenv("ONLY", "")
	script := "#!/bin/sh\nserver=$(cat)\n[ \"$server\" ] || exit 3\necho \"$server\" >>" + log + "\n" +
		`[ "$server" = "$ONLY" ] || { echo "credentials not found in native keychain"; exit 1; }` + "\n" + `echo '{"Username":"helped","Secret":"pw"}'` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-names"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	hub := `https://index.docker.io/v1/`
	for _, c := range []struct{ config, host, repository, only, want, asked string }{
		{`{"credsStore":"names"}`, "h.example:5000", "x", "h.example:5000", "helped", "h.example:5000"},
		{`{"credsStore":"names"}`, "registry-1.docker.io", "x", hub, "helped", hub},
		{`{"credsStore":"names"}`, "registry-1.docker.io", "x", "docker.io", "helped", hub + " docker.io"},
		{`{"credHelpers":{"docker.io":"names"}}`, "registry-1.docker.io", "x", "docker.io", "helped", hub + " docker.io"},
		{`{"credHelpers":{"h.example":"names"},"credsStore":"missing"}`, "h.example", "x", "h.example", "helped", "h.example"},
		{`{"credHelpers":{"h.example":"names"}}`, "i.example", "x", "h.example", "", ""},
		{`{"credHelpers":{"h.example/a":"names"}}`, "h.example", "a/x", "h.example/a", "helped", "h.example/a"},
		{`{"credHelpers":{"h.example":"names"},"auths":{"h.example/a":{"auth":"` + basic("a:pw") + `"}}}`, "h.example", "a/x", "h.example", "a", ""},
		{`{"credHelpers":{"h.example":"names"},"auths":{"h.example":{"auth":"` + basic("host:pw") + `"}}}`, "h.example", "x", "none", "host", "h.example"},
	} {
		os.Remove(log)
		os.Setenv("ONLY", c.only)
		got := userOf(t, c.config, "https", c.host, c.repository)
		asked, _ := os.ReadFile(log)
		if got != c.want || strings.Join(strings.Fields(string(asked)), " ") != c.asked {
			t.Errorf("%s for %s/%s: %q, asked for %q", c.config, c.host, c.repository, got, asked)
		}
	}
}

// Every file that docker, podman and skopeo write is found, in an order that does not change. The error of a refused
// pull names the files that were read.
func TestCredentialPlaces(t *testing.T) {
	home, run, conf, uid := t.TempDir(), t.TempDir(), t.TempDir(), fmt.Sprint(os.Getuid())
	old := systemRun
	systemRun = filepath.Join(t.TempDir(), "containers")
	t.Cleanup(func() { systemRun = old })
	f := newBasic(t, "me:word")
	content := `{"auths":{"` + f.host() + `":{"auth":"` + basic("me:word") + `"}}}`
	for _, c := range []struct{ file, runtime, config, home string }{
		{home + "/.docker/config.json", "", "", home},
		{home + "/.docker/config.json", run, conf, home},
		{run + "/containers/auth.json", run, "", home},
		{systemRun + "/" + uid + "/auth.json", "", "", home},
		{systemRun + "/" + uid + "/auth.json", "", "", ""},
		{home + "/.config/containers/auth.json", "", "", home},
		{conf + "/containers/auth.json", "", conf, home},
		{conf + "/containers/auth.json", run, conf, ""},
	} {
		t.Setenv("DOCKER_CONFIG", "")
		t.Setenv("HOME", c.home)
		t.Setenv("XDG_RUNTIME_DIR", c.runtime)
		t.Setenv("XDG_CONFIG_HOME", c.config)
		_, err := fetch(t, open(t, f.host(), Options{}), "latest")
		is(t, err, errdefs.IsUnauthorized)
		if !strings.Contains(err.Error(), c.file) || strings.Count(err.Error(), "no credentials for "+f.host()+"/x in ") != 1 || !strings.Contains(err.Error(), "dist-login") {
			t.Errorf("%s was not looked at, or that is not told: %v", c.file, err)
		}
		if err := os.MkdirAll(filepath.Dir(c.file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
		os.Remove(c.file)
	}
	t.Setenv("DOCKER_AUTH_CONFIG", content)
	if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
		t.Errorf("DOCKER_AUTH_CONFIG: %v", err)
	}
	// A file that the user names is the only one that is read.
	named := filepath.Join(t.TempDir(), "none.json")
	_, err := fetch(t, open(t, f.host(), Options{AuthFile: named}), "latest")
	is(t, err, errdefs.IsUnauthorized)
	if !strings.Contains(err.Error(), named) {
		t.Error(err)
	}
}

// A token for one part of a registry is not used for another part that has another credential.
func TestSharedTokenOfPath(t *testing.T) {
	runtimeDir(t)
	f := newLogins(t)
	for _, users := range []map[string]string{{f.host() + "/x": "x"}, {f.host(): "host"}, {f.host() + "/x": "x", f.host(): "host"}, {f.host() + "/y": "y"}} {
		dockerConfig(t, auths(users))
		if _, err := fetch(t, open(t, f.host(), Options{}), "latest"); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(f.came, " "); got != "x host x " {
		t.Errorf("asked as %q", got)
	}
}
