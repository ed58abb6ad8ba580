package refname

import (
	"slices"
	"strings"
	"testing"
)

func TestIsRepository(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"a", "library/redis", "docker.io/library/redis", "a/b/c/d", "a__b", "a--b/c.d", strings.Repeat("a", 200)} {
		if !IsRepository(name) {
			t.Errorf("%q is a repository", name)
		}
	}
	for _, name := range []string{"", "/a", "a/", "a//b", "../a", "a/../b", "A", "a..b", "a:1", "a@b", ".a", "a/.b", "a b", "a\x00", "ä", strings.Repeat("a", 256)} {
		if IsRepository(name) {
			t.Errorf("%q is no repository", name)
		}
	}
}

func TestSplit(t *testing.T) {
	t.Parallel()
	const dgst = "@sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
	for _, c := range []struct{ name, repository, tag string }{
		{"docker.io/library/redis:7", "docker.io/library/redis", "7"},
		{"x:latest", "x", "latest"},
		{"x/y:1" + dgst, "x/y", "1"},
		{"x/y" + dgst, "x/y", ""},
		{"localhost:5000/x:1", "", ""},
		{"latest", "", ""},
		{"x:", "", ""},
		{"x:a/b", "", ""},
		{"X:1", "", ""},
		{"../x:1", "", ""},
		{"", "", ""},
		{"@", "", ""},
	} {
		repository, tag, ok := Split(c.name)
		if !ok {
			repository, tag = "", ""
		}
		if repository != c.repository || tag != c.tag || ok != (c.repository != "") {
			t.Errorf("Split(%q) = %q, %q, %t", c.name, repository, tag, ok)
		}
	}
}

func TestSpellings(t *testing.T) {
	t.Parallel()
	const dgst = "@sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
	for name, want := range map[string][]string{
		"docker.io/redis:7":         {"docker.io/library/redis:7", "docker.io/redis:7"},
		"docker.io/library/redis:7": {"docker.io/library/redis:7", "docker.io/redis:7"},
		"docker.io/redis":           {"docker.io/library/redis", "docker.io/redis", "docker.io/library/redis:latest", "docker.io/redis:latest"},
		"docker.io/redis" + dgst:    {"docker.io/library/redis" + dgst, "docker.io/redis" + dgst},
		"docker.io/me/redis":        {"docker.io/me/redis", "docker.io/me/redis:latest"},
		"localhost:5000/x":          {"localhost:5000/x", "localhost:5000/x:latest"},
		"localhost:5000/x:1":        {"localhost:5000/x:1"},
		"docker.io/":                {"docker.io/"},
		"docker.io/library/":        {"docker.io/library/", "docker.io/"},
		"./dir":                     {"./dir", "./dir:latest"},
		"./dir:a/b:1":               {"./dir:a/b:1"},
		"ssh::host/dir":             {"ssh::host/dir", "ssh::host/dir:latest"},
		"x":                         {"x", "x:latest"},
		"":                          {""},
	} {
		if got := Spellings(name); !slices.Equal(got, want) {
			t.Errorf("Spellings(%q) = %q, want %q", name, got, want)
		}
	}
}
