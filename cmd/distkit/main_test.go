package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestEachCommandIsInOneGroup(t *testing.T) {
	var all []string
	for _, pattern := range []string{"../*/main.go", "../../scripts/dist-*", "../../scripts/snap-*"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, %v", pattern, len(files), err)
		}
		for _, f := range files {
			switch {
			case filepath.Base(f) == "main.go":
				all = append(all, filepath.Base(filepath.Dir(f)))
			case !strings.HasSuffix(f, ".md"):
				all = append(all, filepath.Base(f))
			}
		}
	}
	var listed []string
	for _, g := range groups {
		listed = append(listed, g.commands...)
	}
	slices.Sort(all)
	slices.Sort(listed)
	if !slices.Equal(all, listed) {
		t.Errorf("groups have %q\nthere are %q", listed, all)
	}
	names := map[string]string{}
	for _, c := range all {
		if other := names[short(c)]; other != "" {
			t.Errorf("%s and %s are both called %s", c, other, short(c))
		}
		names[short(c)] = c
	}
}

// script makes an executable file that prints the last element of its path and its arguments.
func script(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("#!/bin/sh\necho \"${0##*/} $*\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", "relative:"+dir)
	for _, name := range []string{"dist-mine", "dist-run", "run", "snap", "ls", "dist-dir/x"} {
		if strings.Contains(name, "/") {
			if err := os.Mkdir(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		script(t, filepath.Join(dir, name))
	}
	if err := os.WriteFile(filepath.Join(dir, "dist-data"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"mine": "dist-mine", "dist-mine": "dist-mine",
		"run": "dist-run", "dist-run": "dist-run", "run-bundle": "run",
		"snap": "snap", "dist-snap": "",
		"ls": "", "dist-ls": "", "data": "", "dir": "", "dir/x": "", "../" + filepath.Base(dir) + "/mine": "", "": "", "no": "",
	} {
		if want != "" {
			want = filepath.Join(dir, want)
		}
		if got := find(name); got != want {
			t.Errorf("%q is %q, not %q", name, got, want)
		}
	}
}
