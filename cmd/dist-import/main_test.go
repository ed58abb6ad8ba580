package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"distkit/content"

	"github.com/containerd/console"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// bin has dist-import and dist-export, which are tested together: each makes the other's input.
var bin string

func TestMain(m *testing.M) {
	os.Exit(build(m))
}

func build(m *testing.M) int {
	dir, err := os.MkdirTemp("", "dist-import-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	bin = dir
	if out, err := exec.Command("go", "build", "-o", dir+"/", ".", "../dist-export").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		return 1
	}
	for _, v := range []string{"DIST_ROOT", "CONTAINERD_NAMESPACE", "DIST_HOLD"} {
		os.Unsetenv(v)
	}
	return m.Run()
}

func command(dir, name string, args ...string) *exec.Cmd {
	c := exec.Command(filepath.Join(bin, name), args...)
	c.Dir = dir
	return c
}

func run(t *testing.T, dir string, stdin io.Reader, name string, args ...string) (string, string, int) {
	t.Helper()
	var out, errs strings.Builder
	c := command(dir, name, args...)
	c.Stdin, c.Stdout, c.Stderr = stdin, &out, &errs
	var exit *exec.ExitError
	if err := c.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

// must checks for success and an empty stderr.
func must(t *testing.T, dir string, stdin io.Reader, name string, args ...string) string {
	t.Helper()
	out, errs, status := run(t, dir, stdin, name, args...)
	if status != 0 || errs != "" {
		t.Fatalf("%s %q: status %d: %s", name, args, status, errs)
	}
	return out
}

// fails checks for a status, one line on stderr that contains want, and an empty stdout.
func fails(t *testing.T, dir string, stdin io.Reader, status int, want, name string, args ...string) {
	t.Helper()
	out, errs, got := run(t, dir, stdin, name, args...)
	if got != status || out != "" || strings.Count(errs, "\n") != 1 || !strings.HasPrefix(errs, name+": ") || !strings.Contains(errs, want) {
		t.Errorf("%s %q: status %d, want %d; stdout %d bytes; stderr %q, want %q", name, args, got, status, len(out), errs, want)
	}
}

// write writes a docker archive of images with a layer of size bytes each.
func write(w io.Writer, size int64, tags ...string) error {
	t := tar.NewWriter(w)
	put := func(name string, size int64, r io.Reader) error {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644}); err != nil {
			return err
		}
		_, err := io.CopyN(t, r, size)
		return err
	}
	type docker struct {
		Config           string
		RepoTags, Layers []string
	}
	var images []docker
	for i, tag := range tags {
		layer := func() io.Reader { return &pattern{seed: byte(i + 1)} }
		h := digest.Canonical.Digester()
		if _, err := io.CopyN(h.Hash(), layer(), size); err != nil {
			return err
		}
		config := fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["%s"]}}`, h.Digest())
		img := docker{fmt.Sprintf("%d.json", i), nil, []string{fmt.Sprintf("%d/layer.tar", i)}}
		if tag != "" {
			img.RepoTags = []string{tag}
		}
		images = append(images, img)
		if err := put(img.Config, int64(len(config)), strings.NewReader(config)); err != nil {
			return err
		}
		if err := put(img.Layers[0], size, layer()); err != nil {
			return err
		}
	}
	b, err := json.Marshal(images)
	if err != nil {
		return err
	}
	if err := put("manifest.json", int64(len(b)), bytes.NewReader(b)); err != nil {
		return err
	}
	return t.Close()
}

// pattern is an endless stream of bytes that is not a tar archive; dist-import does not look into layers.
type pattern struct {
	seed byte
}

func (p *pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = p.seed
	}
	return len(b), nil
}

func archive(t *testing.T, tags ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := write(&b, 1000, tags...); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	a := archive(t, "x:1", "example.org/y")
	out := must(t, dir, bytes.NewReader(a), "dist-import")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != 2 {
		t.Fatalf("records %q", out)
	}
	for i, name := range []string{"docker.io/library/x:1", "example.org/y:latest"} {
		got, dgst, ok := strings.Cut(lines[i], "\t")
		if !ok || got != name || digest.Digest(dgst).Validate() != nil {
			t.Errorf("record %q", lines[i])
		}
	}
	if again := must(t, dir, bytes.NewReader(a), "dist-import", "-"); again != out {
		t.Errorf("a second import prints %q, the first %q", again, out)
	}
	if names := must(t, dir, bytes.NewReader(a), "dist-import", "-qz"); names != "docker.io/library/x:1\x00example.org/y:latest\x00" {
		t.Errorf("-qz prints %q", names)
	}
	var record struct {
		Name   string
		Target struct{ Digest string }
	}
	out = must(t, dir, bytes.NewReader(archive(t, "")), "dist-import", "--json", "--name", "n")
	if err := json.Unmarshal([]byte(out), &record); err != nil || record.Name != "n" || record.Target.Digest == "" {
		t.Errorf("--json prints %q: %v", out, err)
	}
}

func TestExportToAnotherStore(t *testing.T) {
	dir := t.TempDir()
	must(t, dir, bytes.NewReader(archive(t, "x:1", "y:1", "z:1")), "dist-import")
	for _, names := range []struct {
		args  []string
		stdin string
		want  string
	}{
		{[]string{"docker.io/library/y:1", "docker.io/library/x:1"}, "", "docker.io/library/x:1 docker.io/library/y:1"},
		{[]string{"-"}, "docker.io/library/z:1\ndocker.io/library/x:1\n", "docker.io/library/x:1 docker.io/library/z:1"},
		{[]string{"-z", "-"}, "docker.io/library/z:1\x00", "docker.io/library/z:1"},
		{[]string{"-"}, "", ""},
		{nil, "", ""},
	} {
		first := must(t, dir, strings.NewReader(names.stdin), "dist-export", names.args...)
		if !strings.HasPrefix(first, "oci-layout\x00") {
			t.Fatalf("%q: no archive", names.args)
		}
		to := t.TempDir()
		out := must(t, to, strings.NewReader(first), "dist-import", "-q")
		if got := strings.Join(strings.Fields(out), " "); got != names.want {
			t.Errorf("%q %q: imported %q, want %q", names.args, names.stdin, got, names.want)
		}
		if again := must(t, to, strings.NewReader(names.stdin), "dist-export", names.args...); again != first {
			t.Errorf("%q: the other store exports another archive", names.args)
		}
	}
	fails(t, dir, nil, 3, "no:1", "dist-export", "docker.io/library/x:1", "no:1")
	fails(t, dir, nil, 2, "empty", "dist-export", "--platform", "", "docker.io/library/x:1")
	fails(t, dir, nil, 2, "nonsense", "dist-export", "--platform", "a/b/c/d/nonsense", "docker.io/library/x:1")
	fails(t, dir, nil, 2, "", "dist-export", "--sparse", "--all-platforms", "docker.io/library/x:1")
}

func TestImportFailures(t *testing.T) {
	dir := t.TempDir()
	good := archive(t, "x:1")
	fails(t, dir, bytes.NewReader(nil), 2, "the input is empty", "dist-import")
	fails(t, dir, bytes.NewReader(good[:1500]), 4, "truncated", "dist-import")
	fails(t, dir, bytes.NewReader(archive(t, "")), 2, "--name", "dist-import")
	fails(t, dir, bytes.NewReader(archive(t, "x:1", "y:1")), 2, "more than one", "dist-import", "--name", "n")
	fails(t, dir, bytes.NewReader(good), 2, "standard input", "dist-import", "x.tar")
	fails(t, dir, bytes.NewReader(good), 2, "--name is empty", "dist-import", "--name", "")
	fails(t, dir, bytes.NewReader(good), 2, "", "dist-import", "--name", "n", "--base-name", "b")
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, errs, status := run(t, dir, bytes.NewReader(good), "dist-import", "--root", "file"); status == 0 || strings.Count(errs, "\n") != 1 {
		t.Errorf("a store that is a file: status %d, %q", status, errs)
	}
	if out := must(t, dir, nil, "dist-export", "-"); !strings.Contains(out, `"manifests":[]`) {
		t.Error("a failed import left a name")
	}
}

func TestTerminalsAreRefused(t *testing.T) {
	pty, slave, err := console.NewPty()
	if err != nil {
		t.Skipf("no pseudo-terminal: %v", err)
	}
	defer pty.Close()
	tty, err := os.OpenFile(slave, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	dir := t.TempDir()
	for _, name := range []string{"dist-import", "dist-export"} {
		var errs strings.Builder
		c := command(dir, name)
		c.Stdin, c.Stdout, c.Stderr = tty, tty, &errs
		_ = c.Run()
		if c.ProcessState.ExitCode() != 2 || !strings.Contains(errs.String(), "is a terminal") {
			t.Errorf("%s: %v, %q", name, c.ProcessState, errs.String())
		}
	}
}

// A killed import does not keep the next one from working. One that dies by a signal leaves nothing.
func TestInterruptedImports(t *testing.T) {
	dir := t.TempDir()
	a := archive(t, "x:1", "y:1")
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		c := command(dir, "dist-import")
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		// The buffers of pipe and reader hold less than this, so a part must have been read.
		if _, err := in.Write(a[:2000]); err != nil {
			t.Fatal(err)
		}
		_ = c.Process.Signal(sig)
		_ = c.Wait()
		if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != sig {
			t.Errorf("%v: %v", sig, c.ProcessState)
		}
		in.Close()
		if out := must(t, dir, nil, "dist-export", "-"); !strings.Contains(out, `"manifests":[]`) {
			t.Errorf("%v left a name", sig)
		}
	}
	must(t, dir, bytes.NewReader(a), "dist-import")
	store, err := content.Open(filepath.Join(dir, ".content"))
	if err != nil {
		t.Fatal(err)
	}
	if left, err := store.ListStatuses(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("ingests left behind: %v, %v", left, err)
	}
}

func TestTheSweepWaitsForAnImport(t *testing.T) {
	dir := t.TempDir()
	store, err := content.Open(filepath.Join(dir, ".content"))
	if err != nil {
		t.Fatal(err)
	}
	c := command(dir, "dist-import")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	a := archive(t, "x:1")
	if _, err := in.Write(a[:len(a)-512]); err != nil {
		t.Fatal(err)
	}
	for blobs := 0; blobs == 0; { // until the first blob has come
		err := store.Digests(t.Context(), func(digest.Digest) error {
			blobs++
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	hold, err := os.Open(filepath.Join(dir, ".content", "hold"))
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	if err := unix.Flock(int(hold.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the sweep's lock, beside an import: %v", err)
	}
	if _, err := in.Write(a[len(a)-512:]); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(hold.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the sweep's lock, after it: %v", err)
	}
}

func TestMemoryDoesNotGrowWithLayers(t *testing.T) {
	const layer, limit = 192 << 20, 48 << 20
	dir := t.TempDir()
	r, w := io.Pipe()
	go func() { w.CloseWithError(write(w, layer, "x:1")) }()
	in := command(dir, "dist-import")
	in.Stdin, in.Stderr = r, os.Stderr
	if err := in.Run(); err != nil {
		t.Fatal(err)
	}
	out := command(dir, "dist-export", "docker.io/library/x:1")
	var n counter
	out.Stdout, out.Stderr = &n, os.Stderr
	if err := out.Run(); err != nil {
		t.Fatal(err)
	}
	if n < layer {
		t.Errorf("export wrote %d bytes", n)
	}
	for _, c := range []*exec.Cmd{in, out} {
		rss := c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
		t.Logf("%s: %d MiB", filepath.Base(c.Path), rss>>20)
		if rss > limit {
			t.Errorf("%s took %d MiB", filepath.Base(c.Path), rss>>20)
		}
	}
}

type counter int64

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}
