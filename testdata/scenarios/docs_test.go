package scenarios

import (
	"bytes"
	"errors"
	"fmt"
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
)

// block is one example of a page.
type block struct {
	line  int
	text  string
	needs string
	skip  string // why it is not run
}

// TestReadme runs the README's blocks marked "```sh", in order, in one bash, and again in one zsh, with -euo
// pipefail, in an empty directory with docker.io mapped to a registry: what a reader does who
// copies them. "```sh needs=root,runc" names what a block needs (see fixture.Has).
func TestReadme(t *testing.T) {
	const page = "README.md"
	text, err := os.ReadFile(filepath.Join(fixture.Root, page))
	if err != nil {
		t.Fatal(err)
	}
	blocks := fenced(string(text))
	for _, section := range []string{"Try it", "The original pipelines"} {
		if !slices.ContainsFunc(blocks, func(b fencedBlock) bool { return b.section == section }) {
			t.Errorf("README has no sh block under %q", "## "+section)
		}
	}
	var script strings.Builder
	for _, b := range blocks {
		if lacks := lacking(b.needs); lacks != "" {
			t.Run(fmt.Sprintf("line_%d", b.line), func(t *testing.T) { t.Skipf("needs %s", lacks) })
			continue
		}
		fmt.Fprintf(&script, "echo '== %s:%d' >&2\n%s\n", page, b.line, b.text)
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

// TestReadmeCanBePasted holds the README's blocks to what an interactive zsh takes as it is: it knows no comments
// unless it is told to, and both shells expand ! outside of single quotes.
func TestReadmeCanBePasted(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(fixture.Root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	quoted := regexp.MustCompile(`(?s)'[^']*'`)
	for _, b := range fenced(string(text)) {
		for _, line := range strings.Split(quoted.ReplaceAllString(b.text, ""), "\n") {
			if strings.Contains(line, "#") || strings.Contains(line, "!") {
				t.Errorf("the block of line %d can't be pasted into zsh: %q", b.line, line)
			}
		}
	}
}

type fencedBlock struct {
	block
	section string // the second-level heading above; "" on the first screen
}

func fenced(text string) []fencedBlock {
	var blocks []fencedBlock
	var now *fencedBlock
	section, inside := "", false
	for i, line := range strings.Split(text, "\n") {
		info, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && !inside:
			inside = true
			if words := strings.Fields(info); len(words) > 0 && words[0] == "sh" {
				now = &fencedBlock{section: section, block: block{line: i + 1}}
				for _, w := range words[1:] {
					if needs, ok := strings.CutPrefix(w, "needs="); ok {
						now.needs = needs
					}
				}
			}
		case fence:
			inside = false
			if now != nil {
				blocks = append(blocks, *now)
			}
			now = nil
		case now != nil:
			now.text += line + "\n"
		case !inside && strings.HasPrefix(line, "## "):
			section = strings.TrimPrefix(line, "## ")
		}
	}
	return blocks
}

// prelude sets what a page's examples may use: parts of the image that the store holds.
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
				switch lacks := lacking(b.needs); {
				case b.skip != "":
					t.Run(fmt.Sprintf("line_%d", b.line), func(t *testing.T) { t.Skipf("by the page: %s", b.skip) })
				case lacks != "":
					t.Run(fmt.Sprintf("line_%d", b.line), func(t *testing.T) { t.Skipf("needs %s", lacks) })
				default:
					script += fmt.Sprintf("echo '== %s:%d' >&2\n%s\n", filepath.Base(page), b.line, b.text)
				}
			}
			w, dir := surroundings(t)
			run := bash
			if slices.ContainsFunc(blocks, func(b block) bool { return strings.Contains(b.needs, "cni") && lacking(b.needs) == "" }) {
				run = elsewhere
			}
			if out, err := run(w, dir, script); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

var comment = regexp.MustCompile(`^<!-- (needs|no test): *(.*?) *-->$`)

// examples returns the indented blocks under the EXAMPLES heading. Blank lines are part of a
// block; text that is not indented ends it.
func examples(page string) []block {
	var blocks []block
	var now *block
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
			now = &block{line: i + 1, text: code + "\n", needs: needs, skip: skip}
			skip = ""
		case indented:
			now.text += code + "\n"
		case strings.TrimSpace(line) == "":
			if now != nil {
				now.text += "\n"
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
	want := []block{
		{line: 9, text: "a |\n  b\n\nc\n\n"},
		{line: 18, text: "d\n\n", needs: "root,runc", skip: "waits"},
		{line: 22, text: "e\n", needs: "root,runc"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

// lacking returns which of the needs this machine lacks.
func lacking(needs string) string {
	var lacks []string
	for _, name := range strings.Split(needs, ",") {
		if name != "" && !fixture.Has(name) {
			lacks = append(lacks, name)
		}
	}
	return strings.Join(lacks, ",")
}

// surroundings returns a registry and an empty directory to work in.
func surroundings(t *testing.T) (*fixture.World, string) {
	t.Helper()
	top, err := os.MkdirTemp(fixture.Dir, "docs-")
	if err == nil {
		err = os.Chmod(top, 0o711) // root of a container's user namespace has to reach the store
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

// elsewhere is bash on a host of its own, for what changes the host's network.
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
