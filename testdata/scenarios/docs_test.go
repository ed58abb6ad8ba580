package scenarios

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/testdata/fixture"
	"distkit/testdata/registry/layouts"
)

// TestReadme runs the README's blocks marked "```sh", in order, in one bash, and again in one zsh, with -euo pipefail,
// in an empty directory with docker.io mapped to a registry, like a reader who copies them. "```sh needs=root,runc"
// lists what a block needs (see fixture.Has).
func TestReadme(t *testing.T) {
	const page = "README.md"
	text, err := os.ReadFile(filepath.Join(fixture.Root, page))
	if err != nil {
		t.Fatal(err)
	}
	blocks := fixture.Blocks(string(text))
	for _, section := range []string{"Try it", "The original pipelines"} {
		if !slices.ContainsFunc(blocks, func(b fixture.Block) bool { return b.Section == section }) {
			t.Errorf("README has no sh block under %q", "## "+section)
		}
	}
	var script strings.Builder
	for _, b := range blocks {
		if lacks := fixture.Lacking(b.Needs); lacks != "" {
			t.Run(fmt.Sprintf("line_%d", b.Line), func(t *testing.T) { t.Skipf("needs %s", lacks) })
			continue
		}
		fmt.Fprintf(&script, "echo '== %s:%d' >&2\n%s\n", page, b.Line, b.Text)
	}
	for _, shell := range [][]string{{"bash", "-euo", "pipefail", "-c"}, {"zsh", "-feuo", "pipefail", "-c"}} {
		t.Run(shell[0], func(t *testing.T) {
			if !fixture.Has(shell[0]) {
				t.Skipf("no %s", shell[0])
			}
			w, dir := surroundings(t)
			if out, err := in(w, dir, append(shell, script.String())...); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// TestReadmeCanBePasted checks that an interactive zsh accepts the README's blocks: by default it has no comments, and
// both shells expand ! outside single quotes.
func TestReadmeCanBePasted(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(fixture.Root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	quoted := regexp.MustCompile(`(?s)'[^']*'`)
	for _, b := range fixture.Blocks(string(text)) {
		for _, line := range strings.Split(quoted.ReplaceAllString(b.Text, ""), "\n") {
			if strings.Contains(line, "#") || strings.Contains(line, "!") {
				t.Errorf("the block of line %d can't be pasted into zsh: %q", b.Line, line)
			}
		}
	}
}

// TestCookbook runs the recipes with the registries of testdata/registry. The end-to-end tests use other registries.
func TestCookbook(t *testing.T) {
	w, dir := surroundings(t)
	var addr [2]string
	for i, password := range []string{"word", ""} {
		registry := layouts.New(t.TempDir(), false)
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, got, _ := r.BasicAuth(); got != password {
				w.Header().Set("WWW-Authenticate", `Basic realm="tests"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			registry.ServeHTTP(w, r)
		}))
		t.Cleanup(s.Close)
		addr[i] = s.URL
	}
	ssh, err := fixture.Machine(filepath.Dir(dir))
	if err := errors.Join(err, w.Host("registry.example.com", "server = '"+addr[0]+"'\n"), w.Host("prod.example.com", "server = '"+addr[1]+"'\n")); err != nil {
		t.Fatal(err)
	}
	w.Vars = append(w.Vars, "REGISTRY_USER=ci", "REGISTRY_PASSWORD=word", "DIST_SSH="+ssh)
	fixture.Cookbook(t, func(script string) (string, error) { return bash(w, dir, script) })
}

// prelude sets the variables that a page's examples may use: parts of the image in the store.
const prelude = `
image=docker.io/library/redis:latest
manifest=$(dist-image manifest $image | jq -r .digest)
config=$(dist-cat $manifest | jq -r .config.digest)
layer=$(dist-cat $manifest | jq -r '.layers[0].digest')
diffid=$(dist-cat $config | jq -r '.rootfs.diff_ids[0]')
digest=$layer
size=$(dist-cat $layer | wc -c)
dist-cat $manifest > manifest.json
`

// TestExamples runs the indented blocks under EXAMPLES of every man page, those of a page in
// order, in one shell with -euo pipefail, in a directory where .content holds
// docker.io/library/redis:latest, docker.io and localhost:5000 are mapped to a registry (see
// testdata/images/tiny.sh for what it has), the variables of prelude are set, and
// manifest.json is the image's. Above a block may stand
//
//	<!-- needs: root,runc -->    what it and the ones below need (see fixture.Has)
//	<!-- no test: why -->        the next block is not run; the test lists these
func TestExamples(t *testing.T) {
	var pages []string
	for _, pattern := range []string{"cmd/*/*.1.md", "scripts/*.1.md", "image/*.7.md"} {
		found, err := filepath.Glob(filepath.Join(fixture.Root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	if len(pages) == 0 {
		t.Fatal("there are no pages")
	}
	w, prepared := surroundings(t)
	if out, err := bash(w, prepared, "dist-pull docker.io/library/redis:latest"); err != nil {
		t.Fatalf("prepare a store: %v\n%s", err, out)
	}
	for _, page := range pages {
		t.Run(strings.TrimSuffix(strings.TrimSuffix(filepath.Base(page), ".1.md"), ".7.md"), func(t *testing.T) {
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			blocks := examples(string(text))
			if len(blocks) == 0 {
				t.Fatal("no block under EXAMPLES")
			}
			script := "cp -a " + filepath.Join(prepared, ".content") + " .\n" + prelude
			for _, b := range blocks {
				switch lacks := fixture.Lacking(b.Needs); {
				case b.Skip != "":
					t.Run(fmt.Sprintf("line_%d", b.Line), func(t *testing.T) { t.Skipf("by the page: %s", b.Skip) })
				case lacks != "":
					t.Run(fmt.Sprintf("line_%d", b.Line), func(t *testing.T) { t.Skipf("needs %s", lacks) })
				default:
					script += fmt.Sprintf("echo '== %s:%d' >&2\n%s\n", filepath.Base(page), b.Line, b.Text)
				}
			}
			w, dir := surroundings(t)
			run := bash
			if slices.ContainsFunc(blocks, func(b fixture.Block) bool { return strings.Contains(b.Needs, "cni") && fixture.Lacking(b.Needs) == "" }) {
				run = elsewhere
			}
			if out, err := run(w, dir, script); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

var comment = regexp.MustCompile(`^<!-- (needs|no test): *(.*?) *-->$`)

// examples returns the indented blocks under the EXAMPLES heading. Blank lines belong to a block. Text that is not
// indented ends it.
func examples(page string) []fixture.Block {
	var blocks []fixture.Block
	var now *fixture.Block
	needs, skip, inside := "", "", false
	flush := func() {
		if now != nil {
			blocks = append(blocks, *now)
		}
		now = nil
	}
	for i, line := range strings.Split(page, "\n") {
		switch code, indented := strings.CutPrefix(line, "    "); {
		case strings.HasPrefix(line, "# "):
			flush()
			inside = line == "# EXAMPLES"
		case !inside:
		case indented && now == nil:
			now = &fixture.Block{Line: i + 1, Text: code + "\n", Needs: needs, Skip: skip}
			skip = ""
		case indented:
			now.Text += code + "\n"
		case strings.TrimSpace(line) == "":
			if now != nil {
				now.Text += "\n"
			}
		default:
			flush()
			if m := comment.FindStringSubmatch(line); m != nil && m[1] == "needs" {
				needs = m[2]
			} else if m != nil {
				skip = m[2]
			}
		}
	}
	flush()
	return blocks
}

func TestExampleBlocks(t *testing.T) {
	got := examples("# NAME\n\n    not this\n\n# EXAMPLES\n\nOne:\n\n    a |\n      b\n\n    c\n\nTwo:\n<!-- needs: root,runc -->\n<!-- no test: waits -->\n\n    d\n\nThree:\n\n    e\n# SEE ALSO\n\n    nor this\n")
	want := []fixture.Block{
		{Line: 9, Text: "a |\n  b\n\nc\n\n"},
		{Line: 18, Text: "d\n\n", Needs: "root,runc", Skip: "waits"},
		{Line: 22, Text: "e\n", Needs: "root,runc"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

// surroundings returns a registry and an empty directory.
func surroundings(t *testing.T) (*fixture.World, string) {
	t.Helper()
	top, err := os.MkdirTemp(fixture.Dir, "docs-")
	if err == nil {
		err = os.Chmod(top, 0o711) // root of a container's user namespace needs access to the store
	}
	if err != nil {
		t.Fatal(err)
	}
	w, err := fixture.NewWorld(filepath.Join(top, "world"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.Close()
		if err := fixture.Unmount(top); err != nil {
			t.Error(err)
		}
		// The shim of a container that an example waited for may still write to the store's log.
		err := os.RemoveAll(top)
		for range 20 {
			if !errors.Is(err, syscall.ENOTEMPTY) {
				break
			}
			time.Sleep(100 * time.Millisecond)
			err = os.RemoveAll(top)
		}
		if err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(top, "here")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return w, dir
}

// bash runs a script with -euo pipefail in dir, and returns what it printed to both streams.
func bash(w *fixture.World, dir, script string) (string, error) {
	return in(w, dir, "bash", "-euo", "pipefail", "-c", script)
}

// elsewhere runs bash on a host of its own, for scripts that change the host's network.
func elsewhere(w *fixture.World, dir, script string) (string, error) {
	const host = `mount -t tmpfs none /run && ip link set lo up && exec bash -euo pipefail -c "$0"`
	return in(w, dir, "unshare", "--net", "--mount", "sh", "-c", host, script)
}

func in(w *fixture.World, dir string, command ...string) (string, error) {
	var out bytes.Buffer
	c := exec.Command(command[0], command[1:]...)
	c.Dir, c.Env, c.Stdout, c.Stderr = dir, w.Vars, &out, &out
	err := fixture.Run(c)
	return out.String(), err
}
