package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"distkit/content"

	"github.com/opencontainers/go-digest"
)

// The test binary is also the command.
func TestMain(m *testing.M) {
	if os.Getenv("DIST_LABEL_TEST") != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestLabel(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	dgst, err := content.WriteBlob(t.Context(), s, "ref", strings.NewReader("x"), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	var input string
	want := func(status int, out string, args ...string) {
		t.Helper()
		c := exec.Command(os.Args[0], args...)
		c.Env = append(os.Environ(), "DIST_LABEL_TEST=1", "DIST_ROOT="+root)
		c.Stdin = strings.NewReader(input)
		got, _ := c.Output()
		if c.ProcessState.ExitCode() != status || string(got) != out {
			t.Errorf("%q: status %d, %q; want %d, %q", args, c.ProcessState.ExitCode(), got, status, out)
		}
	}
	d := string(dgst)
	want(0, "", d)
	want(0, "a\t1\nb\t2=3\n", d, "b=2=3", "a=1")
	want(0, "a\t1\nb\t2=3\n", d)
	want(0, `{"digest":"`+d+`","key":"b","value":"2=3"}`+"\n", "--json", d, "a=")
	want(0, d+"\n", "-q", d)
	want(0, d+"\n", "-q", d, "b=2=3")
	want(2, d+"\tb\t2=3\n", d, "nonsense")
	want(2, "", d, "=x")
	want(2, "", "nonsense")
	want(2, "", "a=1")
	want(2, "", "")
	absent := string(digest.FromString("absent"))
	want(3, "", absent, "a=1")

	// With several blobs, records name the blob. A missing blob does not stop the others.
	other, err := content.WriteBlob(t.Context(), s, "ref", strings.NewReader("y"), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	o := string(other)
	want(0, d+"\tb\t2=3\n"+d+"\tc\t1\n"+o+"\tc\t1\n", d, o, "c=1")
	want(3, d+"\n"+o+"\n", "-q", d, absent, o, "e=1")
	input = d + "\n" + o + "\n"
	want(0, d+"\te\t2\n"+o+"\te\t2\n", "--replace", "-", "e=2")
	want(0, "", "-", "e=")
	want(0, "", "-")
	input = ""
	want(0, "", "-", "e=2")

	// Backslashes are escaped, so that different labels never look alike.
	want(0, `n	a\nb`+"\n", "--replace", d, "n=a\nb")
	want(0, `n	a\\nb`+"\n", d, `n=a\nb`)

	// Labels in a damaged file can be replaced, but not changed.
	file := filepath.Join(root, "labels", "sha256", dgst.Encoded())
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	want(4, "", d)
	want(4, "", d, "a=1")
	want(0, "", "--replace", d)
	want(0, "a\t1\n", d, "a=1")
}
