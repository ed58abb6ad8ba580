package cmd_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

var sections = []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "INPUT", "OUTPUT", "EXIT STATUS", "ENVIRONMENT", "EXAMPLES", "SEE ALSO"}

// statuses are the suite's statuses; 125 to 127 are for commands that run something.
var statuses = []string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}

type page struct {
	text     string
	sections map[string]string
	order    []string
}

func readPage(t *testing.T, name string) page {
	t.Helper()
	path := filepath.Join(name, name+".1.md")
	if slices.Contains(workflows, name) {
		path = filepath.Join("../scripts", name+".1.md")
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%s has no man page: %v", name, err)
	}
	p := page{text: string(b), sections: map[string]string{}}
	for i, part := range regexp.MustCompile(`(?m)^# `).Split(p.text, -1) {
		title, body, _ := strings.Cut(part, "\n")
		if i < 2 {
			continue // before the first heading, or the page's own
		}
		p.order = append(p.order, strings.TrimSpace(title))
		p.sections[strings.TrimSpace(title)] = body
	}
	return p
}

func help(t *testing.T, name string, verb ...string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(bin, name), append(verb, "--help")...).Output()
	if err != nil {
		t.Fatalf("%s %v --help: %v", name, verb, err)
	}
	return string(out)
}

var (
	usageLine  = regexp.MustCompile(`(?m)^Usage:\n  (.+)$`)
	aboutLine  = regexp.MustCompile(`^[a-z].{1,58}[^.]$`)
	verbLine   = regexp.MustCompile(`(?m)^  ([a-z][a-z-]*) +\S`)
	helpFlag   = regexp.MustCompile(`(?m)^ +(?:-(\w), )?--([a-z][a-z0-9-]*)`)
	optionFlag = regexp.MustCompile(`(?m)^\*\*.*--.*$`)
	flagName   = regexp.MustCompile(`--([a-z][a-z0-9-]*)`)
	shortName  = regexp.MustCompile(`\*\*-(\w)\*\*`)
	statusLine = regexp.MustCompile(`(?m)^\*\*(\d+)\*\*`)
)

// verbs returns the sub-commands that --help lists.
func verbs(t *testing.T, name string) []string {
	_, list, ok := strings.Cut(help(t, name), "Available Commands:\n")
	if !ok {
		return nil
	}
	list, _, _ = strings.Cut(list, "\n\n")
	var all []string
	for _, m := range verbLine.FindAllStringSubmatch(list, -1) {
		if m[1] != "help" && m[1] != "completion" {
			all = append(all, m[1])
		}
	}
	return all
}

func TestEveryCommandHasAPageThatHolds(t *testing.T) {
	for _, name := range all() {
		t.Run(name, func(t *testing.T) {
			p := readPage(t, name)
			if want := "# " + name + ` 1 "" distkit` + "\n"; !strings.HasPrefix(p.text, want) {
				t.Errorf("page does not begin with %q", want)
			}
			if !slices.Equal(p.order, sections) {
				t.Errorf("sections are %q, not %q", p.order, sections)
			}
			about, _, _ := strings.Cut(help(t, name), "\n")
			if got, want := strings.TrimSpace(p.sections["NAME"]), name+" - "+about; got != want {
				t.Errorf("NAME and --help differ:\n page %q\n help %q", got, want)
			}
			// distkit help -a prints these in 80 columns.
			if !aboutLine.MatchString(about) {
				t.Errorf("%q is not a line in lower case, without a full stop, of at most 60 characters", about)
			}

			helps := []string{help(t, name)}
			for _, v := range verbs(t, name) {
				h := help(t, name, v)
				if h[0] < 'a' || h[0] > 'z' {
					about, _, _ := strings.Cut(h, "\n")
					t.Errorf("the help of %s does not begin in lower case: %q", v, about)
				}
				helps = append(helps, h)
			}
			var usages []string
			flags, shorts := map[string]bool{}, map[string]bool{}
			for i, h := range helps {
				if i == 0 && len(helps) > 1 {
					// without a verb the command does nothing, and the verbs have the usage lines
				} else if m := usageLine.FindStringSubmatch(h); m == nil {
					t.Errorf("no usage line in %q", h)
				} else {
					usages = append(usages, strings.TrimSpace(m[1]))
				}
				for _, m := range helpFlag.FindAllStringSubmatch(h, -1) {
					flags[m[2]] = true
					if m[1] != "" {
						shorts[m[1]] = true
					}
				}
			}
			var synopsis []string
			for line := range strings.Lines(p.sections["SYNOPSIS"]) {
				if s := strings.TrimSpace(line); s != "" {
					synopsis = append(synopsis, s)
				}
			}
			slices.Sort(usages)
			slices.Sort(synopsis)
			if !slices.Equal(usages, synopsis) {
				t.Errorf("SYNOPSIS and --help differ:\n page %q\n help %q", synopsis, usages)
			}

			documented, shortsDocumented := map[string]bool{}, map[string]bool{}
			for _, line := range optionFlag.FindAllString(p.sections["OPTIONS"], -1) {
				for _, m := range flagName.FindAllStringSubmatch(line, -1) {
					documented[m[1]] = true
				}
				for _, m := range shortName.FindAllStringSubmatch(line, -1) {
					shortsDocumented[m[1]] = true
				}
			}
			compare(t, "flag --", flags, documented)
			compare(t, "flag -", shorts, shortsDocumented)

			allowed := statuses
			if slices.Contains([]string{"run", "task", "dist-run", "dist-hold", "dist-ingest", "dist-userns"}, name) {
				allowed = append(slices.Clone(allowed), "125", "126", "127")
			}
			found := statusLine.FindAllStringSubmatch(p.sections["EXIT STATUS"], -1)
			if len(found) == 0 {
				t.Error("EXIT STATUS lists none")
			}
			for _, m := range found {
				if !slices.Contains(allowed, m[1]) {
					t.Errorf("EXIT STATUS has %s, which is none of the suite's", m[1])
				}
			}
			if !strings.Contains(p.sections["EXAMPLES"], "\n    ") {
				t.Error("EXAMPLES has no example")
			}
		})
	}
}

func compare(t *testing.T, what string, help, page map[string]bool) {
	t.Helper()
	for f := range help {
		if !page[f] {
			t.Errorf("%s%s is in --help, not in OPTIONS", what, f)
		}
	}
	for f := range page {
		if !help[f] {
			t.Errorf("%s%s is in OPTIONS, not in --help", what, f)
		}
	}
}

// pages returns the texts of the repository's pages by name and section, such as dist-pull(1).
func pages(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	title := regexp.MustCompile(`^# (\S+) (\d) `)
	for _, pattern := range []string{"../*/*.[1-8].md", "../*/*/*.[1-8].md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			m := title.FindSubmatch(b)
			if m == nil {
				t.Errorf("%s does not begin with a title", file)
				continue
			}
			all[fmt.Sprintf("%s(%s)", m[1], m[2])] = string(b)
		}
	}
	return all
}

// TestOverviewListsAllPages checks that distkit(7) lists all pages, with the descriptions in their NAME sections.
func TestOverviewListsAllPages(t *testing.T) {
	all := pages(t)
	listed := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\*\*(\S+)\*\*(\(\d\))\n: (.*)$`).FindAllStringSubmatch(all["distkit(7)"], -1) {
		listed[m[1]+m[2]] = m[3]
	}
	name := regexp.MustCompile(`# NAME\n\n\S+ - (.*)\n`)
	for page, text := range all {
		if page == "distkit(7)" {
			continue
		}
		m := name.FindStringSubmatch(text)
		if m == nil {
			t.Errorf("%s has no NAME", page)
		} else if listed[page] != m[1] {
			t.Errorf("distkit(7) says of %s %q, and its page %q", page, listed[page], m[1])
		}
		delete(listed, page)
	}
	for page := range listed {
		t.Errorf("distkit(7) lists %s, which is not there", page)
	}
}

// TestPagesReferToPages checks that pages of ours that are referred to exist.
func TestPagesReferToPages(t *testing.T) {
	all := pages(t)
	ours := regexp.MustCompile(`\*\*((?:dist-|snap-|run-)[a-z0-9-]+|distkit(?:-layout)?|run|snap|task)\*\*(\(\d\))`)
	found := 0
	for page, text := range all {
		for _, m := range ours.FindAllStringSubmatch(text, -1) {
			found++
			if _, ok := all[m[1]+m[2]]; !ok {
				t.Errorf("%s refers to %s", page, m[1]+m[2])
			}
		}
	}
	if found < 500 {
		t.Errorf("only %d references were found", found)
	}
}

// TestCodeOfPagesFits80Columns checks the width of code, which man does not wrap. Lines of SYNOPSIS are those of
// --help.
func TestCodeOfPagesFits80Columns(t *testing.T) {
	for page, text := range pages(t) {
		section := ""
		for i, line := range strings.Split(text, "\n") {
			if strings.HasPrefix(line, "# ") {
				section = line
			}
			code, ok := strings.CutPrefix(line, "    ")
			if n := utf8.RuneCountInString(strings.ReplaceAll(code, "\t", "    ")); ok && section != "# SYNOPSIS" && n > 80 {
				t.Errorf("line %d of %s has %d columns: %s", i+1, page, n, code)
			}
		}
	}
}
