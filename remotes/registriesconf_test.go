package remotes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// A registries.conf has the effect of the corresponding hosts.toml.
func TestRegistriesConf(t *testing.T) {
	list, helpers, err := ParseRegistries([]byte(`
unqualified-search-registries = ["docker.io"]
short-name-mode = "enforcing"
credential-helpers = ["containers-auth.json", "secretservice"]
[aliases]
"alpine" = "docker.io/library/alpine"
[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "mirror.example/proxy/hub"
[[registry.mirror]]
location = "digests.example:5000"
pull-from-mirror = "digest-only"
insecure = true
[[registry]]
prefix = "moved.example"
location = "internal.example:8443/team"
[[registry]]
location = "insecure.example"
insecure = true
mirror-by-digest-only = true
[[registry.mirror]]
location = "m.example"
[[registry]]
location = "[::1]:5000"
insecure = true
[[registry]]
prefix = "bad.example"
blocked = true
[[registry]]
prefix = "docker.io/library"
location = "x.example"
[[registry]]
prefix = "*.example.com"
`))
	if err != nil || len(helpers) != 1 || helpers[0] != "secretservice" {
		t.Fatal(helpers, err)
	}
	root := t.TempDir()
	got := map[string]string{}
	for _, r := range list {
		host, content, err := r.HostsTOML(r.Prefix == "[::1]:5000")
		if strings.ContainsAny(r.Prefix, "/*") {
			is(t, err, errdefs.IsNotImplemented)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(root, HostDirName(host))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		config, err := readHosts(host, Options{HostsDir: root})
		if err != nil {
			got[host] = err.Error()
		}
		for _, e := range config.endpoints {
			flags := ""
			for c, name := range map[capability]string{canAll: "", canPull: " pull", canPull | canResolve: " resolve"} {
				if e.capabilities == c {
					flags += name
				}
			}
			if e.tls != nil && e.tls.InsecureSkipVerify {
				flags += " insecure"
			}
			got[host] += e.scheme + "://" + e.host + e.path + flags + "; "
		}
	}
	for host, want := range map[string]string{
		"docker.io":        "https://mirror.example/v2/proxy/hub resolve; https://digests.example:5000/v2 pull insecure; https://registry-1.docker.io/v2; ",
		"moved.example":    "https://internal.example:8443/v2/team; ",
		"insecure.example": "https://m.example/v2 pull; https://insecure.example/v2 insecure; ",
		"[::1]:5000":       "http://[::1]:5000/v2; ",
	} {
		if got[host] != want {
			t.Errorf("%s: %s\nnot %s", host, got[host], want)
		}
	}
	if !strings.HasSuffix(got["bad.example"], "the registry is blocked") {
		t.Errorf("blocked: %s", got["bad.example"])
	}
	for _, bad := range []string{
		"[registries.search]\nregistries = ['docker.io']", "[[registry]]", "[[registry]]\nlocation='a.b'\n[[registry]]\nprefix='a.b'", "[[registry]]\nlocatoin='a.b'",
		"[[registry]]\nlocation=5", "x",
	} {
		_, _, err := ParseRegistries([]byte(bad))
		is(t, err, errdefs.IsInvalidArgument)
	}
	for _, bad := range []string{
		"location = 'no host'", "location = 'a.b'\n[[registry.mirror]]", "prefix = 'a.b'\nlocation = \"c.d/\\\"\\nx = 1\"", "location = 'a.b'\n[[registry.mirror]]\nlocation = 'https://m'",
		"location = 'a.b'\n[[registry.mirror]]\nlocation = 'm.n'\npull-from-mirror = 'x'",
	} {
		list, _, err := ParseRegistries([]byte("[[registry]]\n" + bad))
		if err != nil || len(list) != 1 {
			t.Fatal(err)
		}
		_, _, err = list[0].HostsTOML(false)
		is(t, err, errdefs.IsInvalidArgument)
	}
}
