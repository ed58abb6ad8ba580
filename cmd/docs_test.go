package cmd_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestComingFrom checks that the commands, verbs and flags in the right-hand columns of docs/coming-from.md exist.
func TestComingFrom(t *testing.T) {
	text, err := os.ReadFile("../docs/coming-from.md")
	if err != nil {
		t.Fatal(err)
	}
	code, flag := regexp.MustCompile("`[^`]+`"), regexp.MustCompile(`^--?[A-Za-z][a-z-]*`)
	helps := map[string]string{} // --help by command, or by command and verb
	of := func(words ...string) string {
		key := strings.Join(words, " ")
		if _, ok := helps[key]; !ok {
			helps[key] = help(t, words[0], words[1:]...)
		}
		return helps[key]
	}
	rows := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.ReplaceAll(line, `\|`, "\x00"), "|")
		if len(cells) != 5 {
			continue
		}
		rows++
		known, command := "", ""
		for _, span := range code.FindAllString(cells[2]+cells[3], -1) {
			words := strings.Fields(strings.Split(strings.Trim(span, "`"), "\x00")[0])
			switch {
			case slices.Contains(all(), words[0]):
				command = words[0]
				known = of(command)
				if vs := verbs(t, command); len(vs) > 0 {
					if len(words) < 2 || !slices.Contains(vs, words[1]) {
						t.Errorf("%s: %s has no such verb", span, command)
						continue
					}
					known = of(command, words[1])
					words = words[1:]
				}
				words = words[1:]
			case command != "" && slices.Contains(verbs(t, command), words[0]):
				known, words = of(command, words[0]), words[1:]
			}
			if strings.Contains(span, " -- ") {
				words = words[:slices.Index(words, "--")]
			}
			for _, w := range words {
				for _, f := range shortFlags(flag.FindString(w)) {
					if known != "" && !regexp.MustCompile(`(?m)(^|[ ,])`+regexp.QuoteMeta(f)+`([ ,=[]|$)`).MatchString(known) {
						t.Errorf("%s: no flag %s of %s", span, f, command)
					}
				}
			}
		}
	}
	if rows < 50 {
		t.Errorf("%d rows are read", rows)
	}
}

// shortFlags returns the flags in a word: -it is -i and -t.
func shortFlags(word string) (flags []string) {
	switch {
	case word == "":
	case strings.HasPrefix(word, "--"):
		flags = []string{word}
	default:
		for _, r := range word[1:] {
			flags = append(flags, "-"+string(r))
		}
	}
	return flags
}

// TestMapPageNamesWhatThereIs checks that the functions named in CONTRIBUTING.md, as package.Function or
// package.Type.Method, exist.
func TestMapPageNamesWhatThereIs(t *testing.T) {
	text, err := os.ReadFile("../CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	dirs := map[string][]string{} // directories by package name
	err = filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs[d.Name()] = append(dirs[d.Name()], name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile("`([a-z]+)((?:\\.[A-Z][A-Za-z]+){1,2})`").FindAllStringSubmatch(string(text), -1)
	if len(names) < 10 {
		t.Errorf("only %d names were found", len(names))
	}
	for _, m := range names {
		words := strings.Split(m[2][1:], ".")
		declared := regexp.MustCompile(`(?m)^(func|type) ` + words[0] + `\b`)
		if len(words) == 2 {
			declared = regexp.MustCompile(`(?m)^func \(\w+ \*?` + words[0] + `\) ` + words[1] + `\b`)
		}
		found := false
		for _, dir := range dirs[m[1]] {
			files, _ := filepath.Glob(dir + "/*.go")
			for _, file := range files {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				found = found || declared.Match(b)
			}
		}
		if !found {
			t.Errorf("CONTRIBUTING.md names %s, which is not there", m[0])
		}
	}
}

// TestPageLinks holds the links between the Markdown files to the files and headings that there are.
func TestPageLinks(t *testing.T) {
	link, heading := regexp.MustCompile(`\]\(([^)\s]+)\)`), regexp.MustCompile(`(?m)^#+ (.*)$`)
	anchors := func(text string) map[string]bool {
		all := map[string]bool{"": true}
		for _, m := range heading.FindAllStringSubmatch(text, -1) {
			slug := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(m[1]), "")
			all[strings.ReplaceAll(slug, " ", "-")] = true
		}
		return all
	}
	found := 0
	for _, pattern := range []string{"../*.md", "../docs/*.md", "../contrib/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range link.FindAllStringSubmatch(string(text), -1) {
				if strings.Contains(m[1], "://") {
					continue
				}
				found++
				to, anchor, _ := strings.Cut(m[1], "#")
				name := file
				if to != "" {
					name = filepath.Join(filepath.Dir(file), to)
				}
				target, err := os.ReadFile(name)
				if err != nil {
					t.Errorf("%s: %v", file, err)
				} else if !anchors(string(target))[anchor] {
					t.Errorf("%s links to %s, which has no such heading", file, m[1])
				}
			}
		}
	}
	if found < 30 {
		t.Errorf("only %d links were found", found)
	}
}
