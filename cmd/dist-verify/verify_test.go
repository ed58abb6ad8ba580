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
	if os.Getenv("DIST_VERIFY_TEST") != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestVerify(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	want := func(status int, out string, args ...string) {
		t.Helper()
		c := exec.Command(os.Args[0], args...)
		c.Env = append(os.Environ(), "DIST_VERIFY_TEST=1", "DIST_ROOT="+root)
		got, _ := c.Output()
		if c.ProcessState.ExitCode() != status || string(got) != out {
			t.Errorf("%q: status %d, %q; want %d, %q", args, c.ProcessState.ExitCode(), got, status, out)
		}
	}
	want(0, "")
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, text := range strings.Split("abcdefghij", "") {
		dgst, err := content.WriteBlob(t.Context(), s, "ref", strings.NewReader(text), 0, "")
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(dgst))
	}
	want(0, "")
	bad, absent := all[4], string(digest.FromString("absent"))
	path, _ := s.Path(digest.Digest(bad))
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	want(4, bad+"\tcorrupt\n")
	want(4, bad+"\n", "-q", "--jobs", "1")
	want(4, bad+"\tcorrupt\n", bad, all[0])
	want(4, absent+"\tmissing\n", absent)
	want(0, "", all[0])
	want(2, "", "nonsense")
	want(2, "", "--jobs", "0")
	want(0, bad+"\tcorrupt\n", "--delete")
	want(0, "", "--delete")
	if err := os.WriteFile(filepath.Join(root, "blobs", "stray"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	want(4, "blobs/stray\tstray\n")
}
