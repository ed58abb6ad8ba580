package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/content"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The test binary is the command itself, too.
func TestMain(m *testing.M) {
	if os.Getenv("DIST_ACTIVE_TEST") != "" {
		main()
	}
	os.Exit(m.Run())
}

func command(root string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "DIST_ACTIVE_TEST=1", "DIST_ROOT="+root)
	return c
}

func TestTable(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	if out, err := command(root).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("of no store: %q, %v", out, err)
	}
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Writer(t.Context(), "ref", 100, digest.FromString("x"))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, _ = w.Write(make([]byte, 42))
	for _, state := range []string{"active", "stale"} {
		out, err := command(root).Output()
		f := strings.Split(strings.TrimSuffix(string(out), "\n"), "\t")
		if err != nil || len(f) != 6 || f[0] != "ref" || f[1] != "42" || f[2] != "100" || f[5] != state {
			t.Errorf("%q, %v; want %s", f, err, state)
		}
		for _, at := range f[3:5] {
			if _, err := time.Parse(time.RFC3339Nano, at); err != nil {
				t.Error(err)
			}
		}
		if out, err := command(root, "-q").Output(); err != nil || string(out) != "ref\n" {
			t.Errorf("%q, %v", out, err)
		}
		_ = w.Close()
	}
}

func TestWatchEndsWhenAllIsThere(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	put := func(text string) {
		t.Helper()
		if _, err := content.WriteBlob(t.Context(), s, text, strings.NewReader(text), 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	line := func(text string) string {
		return fmt.Sprintf("{\"digest\":%q,\"size\":%d}\n", digest.FromString(text), len(text))
	}
	put("there")
	c := command(root, "--watch", "-")
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(in, line("there"), line("there"), line("comes"))
	put("comes")
	in.Close()
	if err := c.Wait(); err != nil || out.Len() > 0 || errs.Len() > 0 {
		t.Errorf("%v; stdout %q, stderr %q", err, &out, &errs)
	}

	c = command(root, "--watch", "-")
	c.Stdin = strings.NewReader(fmt.Sprintf("%s\t5\tapplication/x\n%[1]s\t5\t", digest.FromString("there")))
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("lines of fields: %q, %v", out, err)
	}

	for _, bad := range []string{"nonsense\n", digest.FromString("there").String() + "\t5\n", digest.FromString("there").String() + "\tfive\tx/y\n", "sha256:x\t5\tx/y\n", `{"digest":"sha256:x"}`, "[]"} {
		c := command(root, "--watch", "-")
		c.Stdin = strings.NewReader(bad)
		if err := c.Run(); err == nil || c.ProcessState.ExitCode() != 2 {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestLookTellsStatesApart(t *testing.T) {
	s, err := content.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	o := &object{digest: digest.FromString("hello"), size: 5}
	want := func(state state, offset int64) {
		t.Helper()
		if err := o.look(s, false); err != nil || o.state != state || o.offset != offset {
			t.Errorf("%s at %d, %v; want %s at %d", o.state, o.offset, err, state, offset)
		}
	}
	want(waiting, 0)
	w, err := s.Writer(t.Context(), "ref", 5, o.digest)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, _ = w.Write([]byte("hel"))
	want(downloading, 3)
	_, _ = w.Write([]byte("lo"))
	if err := w.Commit(t.Context(), 0, "", nil); err != nil {
		t.Fatal(err)
	}
	want(done, 5)
	again := &object{digest: o.digest, size: 5}
	if err := again.look(s, true); err != nil || again.state != exists {
		t.Errorf("%s, %v", again.state, err)
	}
}

func TestNames(t *testing.T) {
	d := ocispec.Descriptor{Digest: digest.FromString("")}
	for mediaType, want := range map[string]string{
		ocispec.MediaTypeImageIndex:                                 "index-sha256:e3b0c44298fc",
		"application/vnd.docker.distribution.manifest.list.v2+json": "index-sha256:e3b0c44298fc",
		ocispec.MediaTypeImageManifest:                              "manifest-sha256:e3b0c44298fc",
		"application/vnd.docker.distribution.manifest.v2+json":      "manifest-sha256:e3b0c44298fc",
		ocispec.MediaTypeImageConfig:                                "config-sha256:e3b0c44298fc",
		"application/vnd.docker.container.image.v1+json":            "config-sha256:e3b0c44298fc",
		ocispec.MediaTypeImageLayerZstd:                             "layer-sha256:e3b0c44298fc",
		"application/vnd.docker.image.rootfs.diff.tar.gzip":         "layer-sha256:e3b0c44298fc",
		"": "blob-sha256:e3b0c44298fc",
	} {
		d.MediaType = mediaType
		if got := name(d); got != want {
			t.Errorf("%s: %s, not %s", mediaType, got, want)
		}
	}
}

func TestFramesFitTheTerminal(t *testing.T) {
	var objects []*object
	for i := range 30 {
		o := &object{name: fmt.Sprintf("layer-sha256:%012d", i), size: 1 << 40, state: state(i % 4), offset: int64(i) << 35}
		if o.state >= exists {
			o.offset = o.size
		}
		objects = append(objects, o)
	}
	objects[0].size, objects[0].offset = 0, 12 // a size that isn't known
	for _, width := range []int{0, 1, 20, 40, 60, 79, 200} {
		for _, height := range []int{0, 1, 3, 4, 10, 24, 100} {
			d := &display{begin: time.Now().Add(-time.Minute)}
			lines := d.frame(objects, width, height, time.Now(), false)
			if len(lines) > max(height, 3) {
				t.Errorf("%d lines for a height of %d", len(lines), height)
			}
			for _, l := range lines {
				if len(l) > width {
					t.Errorf("%q is wider than %d", l, width)
				}
			}
			if width == 200 && height == 10 && !strings.Contains(lines[0], "downloading") {
				t.Errorf("what moves is not shown first: %q", lines)
			}
			if lines := d.frame(objects, width, height, time.Now(), true); len(lines) != len(objects)+1 {
				t.Errorf("the last frame has %d lines", len(lines))
			}
		}
	}
}

func TestRateIsOfThisRun(t *testing.T) {
	begin := time.Now()
	d := &display{begin: begin}
	o := &object{size: 100 << 20, first: 50 << 20, offset: 50 << 20, state: downloading}
	d.summary([]*object{o}, begin, false)
	o.offset = 60 << 20
	if got := d.summary([]*object{o}, begin.Add(time.Second), false); !strings.Contains(got, "60 MiB of 100 MiB") || !strings.Contains(got, "(10 MiB/s)") {
		t.Error(got)
	}
	if got := d.summary([]*object{o}, begin.Add(100*time.Second), false); !strings.Contains(got, "(0 B/s)") && !strings.Contains(got, "(103 KiB/s)") {
		t.Error(got)
	}
	o.offset = 100 << 20
	if got := d.summary([]*object{o}, begin.Add(100*time.Second), true); !strings.Contains(got, "(512 KiB/s)") {
		t.Error(got)
	}
}
