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

// The test binary is the command itself, too.
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
	want := func(status int, out string, args ...string) {
		t.Helper()
		c := exec.Command(os.Args[0], args...)
		c.Env = append(os.Environ(), "DIST_LABEL_TEST=1", "DIST_ROOT="+root)
		got, _ := c.Output()
		if c.ProcessState.ExitCode() != status || string(got) != out {
			t.Errorf("%q: status %d, %q; want %d, %q", args, c.ProcessState.ExitCode(), got, status, out)
		}
	}
	d := string(dgst)
	want(0, "", d)
	want(0, "a\t1\nb\t2=3\n", d, "b=2=3", "a=1")
	want(0, "a\t1\nb\t2=3\n", d)
	want(0, `{"key":"b","value":"2=3"}`+"\n", "--json", d, "a=")
	want(2, "", d, "nonsense")
	want(2, "", d, "=x")
	want(2, "", "nonsense")
	want(3, "", string(digest.FromString("absent")), "a=1")
}
