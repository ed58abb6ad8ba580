package main

import (
	"errors"
	"io/fs"
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
	c := exec.Command(os.Args[0], "--delete")
	c.Env = append(os.Environ(), "DIST_VERIFY_TEST=1", "DIST_ROOT="+root)
	var said strings.Builder
	c.Stderr = &said
	if err := c.Run(); err == nil || said.String() != "dist-verify: 1 other problems are left, such as \"blobs/stray\": stray\n" {
		t.Errorf("--delete beside a stray file: %v, %q", err, said.String())
	}
	if err := os.Remove(filepath.Join(root, "blobs", "stray")); err != nil {
		t.Fatal(err)
	}

	// After an interrupted run, the blobs in the journal are not verified again, even if its last line is incomplete.
	file := filepath.Join(t.TempDir(), "journal")
	spoil := func(dgst string) {
		t.Helper()
		path, _ := s.Path(digest.Digest(dgst))
		if err := errors.Join(os.Chmod(path, 0o644), os.WriteFile(path, []byte("x"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	spoil(all[0])
	spoil(all[1])
	write(header + all[0] + "\n" + all[1][:30])
	want(4, all[1]+"\tcorrupt\n", "--resume", file)
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after a whole run: %v", err)
	}
	for _, text := range []string{"", header[:10]} {
		write(text)
		want(0, "", "--resume", file, all[2])
	}
	write("precious")
	want(8, "", "--resume", file)
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("another file: %q, %v", b, err)
	}
	write(header)
	j, err := openJournal(file)
	if err != nil {
		t.Fatal(err)
	}
	want(5, "", "--resume", file)
	if err := errors.Join(j.add(digest.Digest(all[0])), j.close(false)); err != nil {
		t.Fatal(err)
	}
	// A run that must stop keeps its journal.
	dir := filepath.Join(root, "blobs", "sha512")
	if err := os.WriteFile(dir, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	want(8, all[1]+"\tcorrupt\n", "--resume", file)
	b, err := os.ReadFile(file)
	if err != nil || strings.Count(string(b), "\n") != len(all)-1 || strings.Contains(string(b), all[1]) {
		t.Errorf("journal of a run that stopped: %q, %v", b, err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	want(0, all[1]+"\tcorrupt\n", "--resume", file, "--delete")
}
