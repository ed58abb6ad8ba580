package main

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func run(t *testing.T, args ...string) ([]byte, error) {
	t.Helper()
	var out bytes.Buffer
	c := newCmd()
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetOut(&out)
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return out.Bytes(), err
}

// layer writes a layer with one file, and returns its path and diff ID.
func layer(t *testing.T, dir, name string) (path, diffID string) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, name+".tar")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, string(digest.FromBytes(b.Bytes()))
}

func TestOutputIsWholeOrAsItWas(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, diffA := layer(t, dir, "a")
	b, diffB := layer(t, dir, "b")
	want, err := run(t, a, b)
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "image")
	if out, err := run(t, "-o", image, "--expect-diff-id", diffA, "--expect-diff-id", diffB, a, b); err != nil || len(out) > 0 {
		t.Fatalf("%d bytes on standard output: %v", len(out), err)
	}
	for range 2 { // before and after a failure
		if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the file has %d bytes, standard output had %d: %v", len(got), len(want), err)
		}
		if _, err := run(t, "-o", image, "--expect-diff-id", diffB, "--expect-diff-id", diffA, a, b); !errdefs.IsDataLoss(err) {
			t.Errorf("layers in the wrong order: got %v", err)
		}
	}
	if names, err := os.ReadDir(filepath.Dir(image)); err != nil || len(names) != 1 {
		t.Errorf("files are left: %v, %v", names, err)
	}
}

// Several runs with one output do not disturb each other, and a layer beside it may have any name.
func TestOutputOfSeveralRuns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, _ := layer(t, dir, "a")
	b, _ := layer(t, dir, "b")
	want, err := run(t, a)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	image, fifo := filepath.Join(dir, "image"), filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	first := make(chan error, 1)
	go func() {
		_, err := run(t, "-o", image, fifo)
		first <- err
	}()
	to, err := os.OpenFile(fifo, os.O_WRONLY, 0) // opens when the first run reads its layer
	if err != nil {
		t.Fatal(err)
	}
	if _, err := run(t, "-o", image, b); err != nil {
		t.Errorf("the second run: %v", err)
	}
	if _, err := to.Write(data); err != nil {
		t.Error(err)
	}
	if err := to.Close(); err != nil {
		t.Error(err)
	}
	if err := <-first; err != nil {
		t.Errorf("the first run: %v", err)
	}
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the file has %d bytes and not what the last run wrote: %v", len(got), err)
	}
	for _, in := range []string{image + ".new", image} { // beside the output, and the output itself
		if err := os.WriteFile(in, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := run(t, "-o", image, in); err != nil {
			t.Errorf("%s: %v", in, err)
		}
		if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, want) {
			t.Errorf("of %s: %d bytes, %v", in, len(got), err)
		}
	}
	if got, err := os.ReadFile(image + ".new"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the layer has %d bytes: %v", len(got), err)
	}
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, diffID := layer(t, dir, "a")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(a, link); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--whiteouts", "overlay", a, a}, {"--expect-diff-id", diffID, a, a}, {"--expect-diff-id", "x", a}, {"-o", "/dev/null", a},
		{"-o", link, a}, {"-o", dir, a},
	} {
		if out, err := run(t, args...); !errdefs.IsInvalidArgument(err) || len(out) > 0 {
			t.Errorf("%q: got %v and %d bytes", args, err, len(out))
		}
	}
	if _, err := run(t, filepath.Join(dir, "missing")); !errdefs.IsNotFound(err) {
		t.Errorf("a missing layer: got %v", err)
	}
	if _, err := run(t, "--max-memory", "100", a); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("too much memory: got %v", err)
	}
}
