package remotes

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestAuthFiles(t *testing.T) {
	dir := t.TempDir()
	for _, v := range []string{"HOME", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"} {
		t.Setenv(v, filepath.Join(dir, v))
	}
	t.Setenv("REGISTRY_AUTH_FILE", "")
	t.Setenv("DOCKER_AUTH_CONFIG", "")
	if files := AuthFiles(Options{}); len(files) != 0 {
		t.Errorf("no file is there: %v", files)
	}
	write := func(name, content string) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("DOCKER_CONFIG/config.json", `{"auths":{"b.example":{"auth":"c2VjcmV0"},"a.example":{}},"credHelpers":{"a.example":"x"},"credsStore":"pass"}`)
	write("XDG_CONFIG_HOME/containers/auth.json", `{"auths":"secret"}`)
	files := AuthFiles(Options{})
	if len(files) != 2 {
		t.Fatalf("%d files: %v", len(files), files)
	}
	if f := files[0]; !slices.Equal(f.Hosts, []string{"a.example", "b.example"}) || f.Default != "pass" || f.Err != nil {
		t.Errorf("docker's: %v", f)
	}
	if f := files[1]; f.Err == nil || strings.Contains(f.Err.Error(), "secret") || len(f.Hosts) != 0 {
		t.Errorf("one that is malformed: %v", f)
	}
	if files := AuthFiles(Options{AuthFile: filepath.Join(dir, "none")}); len(files) != 1 || !os.IsNotExist(files[0].Err) {
		t.Errorf("a named one that is missing: %v", files)
	}
}

func TestConfiguredHosts(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a + "/docker.io", b + "/docker.io", b + "/example_5000_", b + "/.git"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(b+"/README", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	hosts := ConfiguredHosts(Options{HostsDir: a + ":" + b + ":/no/such"})
	if !slices.Equal(hosts, []string{"docker.io", "example_5000_"}) {
		t.Errorf("hosts are %q", hosts)
	}
}
