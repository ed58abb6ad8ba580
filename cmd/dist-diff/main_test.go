package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"distkit/archive"
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

func TestDescriptorIsTheLayers(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1000")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for form, mediaType := range map[string]string{
		"gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
		"zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
		"none": "application/vnd.oci.image.layer.v1.tar",
	} {
		file := filepath.Join(t.TempDir(), "descriptor")
		layer, err := run(t, "--compress", form, "--descriptor", file, t.TempDir(), dir)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(text, &got); err != nil || bytes.Count(text, []byte("\n")) != 1 {
			t.Fatalf("descriptor is not one line of JSON: %q: %v", text, err)
		}
		to := t.TempDir()
		applied, err := archive.Apply(t.Context(), to, bytes.NewReader(layer), archive.Options{})
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]any{"mediaType": mediaType, "digest": string(digest.FromBytes(layer)), "size": float64(len(layer)), "diffID": string(applied.DiffID)}
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s: %s is %v, not %v", form, k, got[k], v)
			}
		}
		info, err := os.Stat(filepath.Join(to, "f"))
		if err != nil || !info.ModTime().Equal(time.Unix(1000, 0)) {
			t.Errorf("%s: the time is not clamped: %v, %v", form, info, err)
		}
	}
}

func TestFailureLeavesAnEmptyDescriptor(t *testing.T) {
	file := filepath.Join(t.TempDir(), "descriptor")
	if _, err := run(t, "--descriptor", file, filepath.Join(t.TempDir(), "missing")); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || len(b) > 0 {
		t.Errorf("descriptor is %q: %v", b, err)
	}
}

func TestWrongUsage(t *testing.T) {
	dir := t.TempDir()
	for _, args := range [][]string{
		{"--compress", "xz", dir}, {"", dir}, {"--overlay", dir, dir},
	} {
		if out, err := run(t, args...); !errdefs.IsInvalidArgument(err) || len(out) > 0 {
			t.Errorf("%q: got %v and %d bytes", args, err, len(out))
		}
	}
	for _, epoch := range []string{"now", "-1", "1.5"} {
		t.Setenv("SOURCE_DATE_EPOCH", epoch)
		if _, err := run(t, dir); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), epoch) {
			t.Errorf("SOURCE_DATE_EPOCH=%s: got %v", epoch, err)
		}
	}
}
