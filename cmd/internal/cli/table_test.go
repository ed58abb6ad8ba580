package cli

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestColumnsOfWideCharacters(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]int{"": 0, "abc": 3, "é": 1, "e\u0301": 1, "日本": 4, "🐳x": 3, "ｱ": 1, "Ａ": 2, "…": 1} {
		if got := Columns(s); got != want {
			t.Errorf("%q takes %d columns, not %d", s, got, want)
		}
	}
}

func TestCut(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		text  string
		width int
		want  string
	}{
		{"redis:latest", 12, "redis:latest"},
		{"redis:latest", 7, "red…est"},
		{"redis server", 7, "redis …"},
		{"日本語日本語", 12, "日本語日本語"},
		{"日本語日本語", 7, "日本…語"},
		{"日本語 日本語", 6, "日本…"},
		{"abc", 1, "…"},
	} {
		got := Cut(c.text, c.width)
		if got != c.want || Columns(got) > c.width {
			t.Errorf("%q in %d columns: %q, not %q", c.text, c.width, got, c.want)
		}
	}
}

// Every line of a table fits, if the columns can be cut that far. The first column is cut last.
func TestLinesFit(t *testing.T) {
	t.Parallel()
	row := func(texts ...string) (row []cell) {
		for _, text := range texts {
			row = append(row, cell{text: text})
		}
		return row
	}
	const ref = "docker.io/library/redis:latest"
	for width := 40; width <= 200; width++ {
		sentence := cell{text: "install it, or name another one by --runtime 日本語日本語日本語", wraps: true}
		rows := [][]cell{row("REF", "TYPE", "DIGEST", "WHAT TO DO"), append(row(ref, "docker foreign gzip", "sha256:"+strings.Repeat("0123456789abcdef", 4)), sentence), row("日本語", "", "", "-")}
		text := align(rows, width)
		for line := range strings.Lines(text) {
			if n := Columns(strings.TrimSuffix(line, "\n")); n > width {
				t.Errorf("%d columns: a line has %d: %q", width, n, line)
			}
		}
		if width >= 60 && !strings.Contains(text, ref) {
			t.Errorf("%d columns: REF is cut:\n%s", width, text)
		}
		for word := range strings.FieldsSeq("install it, or name another") {
			if width >= 70 && !strings.Contains(text, word) {
				t.Errorf("%d columns: %q is cut:\n%s", width, word, text)
			}
		}
	}
}

// A column that is narrower than a character of its text ends with a mark.
func TestWrappedLines(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		text  string
		width int
		want  string
	}{
		{"one two", 4, "one|two"},
		{"漢字x", 2, "漢|字|x"},
		{"漢字x", 1, "…"},
		{"x漢字", 1, "x|…"},
	} {
		var lines []string
		for rest, line := (cell{text: c.text, wraps: true}), ""; rest.text != "" && len(lines) < 10; {
			line, rest.text = rest.line(c.width)
			lines = append(lines, line)
		}
		if got := strings.Join(lines, "|"); got != c.want {
			t.Errorf("%q in %d columns: %q, not %q", c.text, c.width, got, c.want)
		}
	}
}

func TestMediaTypesAndStates(t *testing.T) {
	const docker = "application/vnd.docker.distribution.manifest.v2+json"
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "")
	if got := onTerminal(t, 80, "kinds", docker, "running"); got != "TYPE    STATE\r\ndocker  \x1b[32mrunning\x1b[0m\r\n" {
		t.Errorf("%q", got)
	}
	if got := onTerminal(t, 80, "kinds", "application/x\x1b", "sleeping"); got != "TYPE            STATE\r\napplication/x?  sleeping\r\n" {
		t.Errorf("%q", got)
	}
	if got := onTerminal(t, 80, "--full", "kinds", docker, "x"); !strings.Contains(got, docker) {
		t.Errorf("%q", got)
	}
	for _, env := range [][2]string{{"NO_COLOR", "1"}, {"TERM", "dumb"}} {
		t.Run(env[0], func(t *testing.T) {
			t.Setenv(env[0], env[1])
			if got := onTerminal(t, 80, "kinds", docker, "running"); strings.Contains(got, "\x1b") {
				t.Errorf("%q", got)
			}
		})
	}
	if r := probe(t, "", nil, "kinds", docker, "running"); r.out != docker+"\trunning\n" {
		t.Errorf("in a pipe: %q", r.out)
	}
}

func TestTableInAPipe(t *testing.T) {
	t.Parallel()
	const docker = "application/vnd.docker.distribution.manifest.v2+json"
	for columns, want := range map[string]string{
		"":   "TYPE    STATE\ndocker  running for a long time\n",
		"20": "TYPE    STATE\ndocker  running for…\n",
		"x":  "TYPE    STATE\ndocker  running for a long time\n",
		"-1": "TYPE    STATE\ndocker  running for a long time\n",
	} {
		if r := probe(t, "", []string{"COLUMNS=" + columns}, "--human", "kinds", docker, "running for a long time"); r.out != want {
			t.Errorf("%q columns: %q", columns, r.out)
		}
	}
	if r := probe(t, "", nil, "--human", "--json", "kinds", docker, "running"); r.out != "null\n" {
		t.Errorf("with --json: %q", r.out)
	}
}

// A listing tells a person that there is no store, but not a program.
func TestNoStore(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	none := filepath.Join(dir, "none")
	if r := probe(t, "", nil, "--root", none, "nothing"); r.out != "" || r.errs != "" || r.state.ExitCode() != 0 {
		t.Errorf("in a pipe: %q, %q, %v", r.out, r.errs, r.state)
	}
	if r := probe(t, "", nil, "--root", none, "--human", "nothing"); r.out != "" || r.errs != "probe: no store at "+none+" (--root or DIST_ROOT name one)\n" || r.state.ExitCode() != 0 {
		t.Errorf("for a person: %q, %q, %v", r.out, r.errs, r.state)
	}
	if r := probe(t, "", nil, "--root", dir, "--human", "nothing"); r.out != "" || r.errs != "" {
		t.Errorf("of a store: %q, %q", r.out, r.errs)
	}
}
