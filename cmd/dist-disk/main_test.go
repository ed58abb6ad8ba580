package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"distkit/content"
)

// pack makes a layer of empty regular files, or directories if a name ends with a slash.
func pack(t *testing.T, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		h.Mode, h.ModTime = 0o644, time.Unix(1486094706, 0)
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// store returns a store with an image of layers, and the image's digest. diffIDs are the diff IDs in its configuration;
// nil means the layers' own.
func store(t *testing.T, diffIDs []digest.Digest, layers ...[]byte) (root string, image digest.Digest) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "store")
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	put := func(mediaType string, b []byte) v1.Descriptor {
		d := digest.FromBytes(b)
		if _, err := content.WriteBlob(t.Context(), s, d.String(), bytes.NewReader(b), int64(len(b)), d); err != nil {
			t.Fatal(err)
		}
		return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
	}
	document := func(mediaType string, v any) v1.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return put(mediaType, b)
	}
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for _, l := range layers {
		d := put(v1.MediaTypeImageLayer, l)
		if m.Layers = append(m.Layers, d); len(diffIDs) < len(m.Layers) {
			diffIDs = append(diffIDs, d.Digest)
		}
	}
	m.Config = document(v1.MediaTypeImageConfig, v1.Image{RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs}})
	return root, document(v1.MediaTypeImageManifest, m).Digest
}

func run(t *testing.T, args ...string) (out []byte, errs string, err error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	c := newCommand()
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetOut(&stdout)
	c.SetErr(&stderr)
	c.SetArgs(args)
	err = c.ExecuteContext(t.Context())
	return stdout.Bytes(), stderr.String(), err
}

// onlyOutput checks that the file's directory has no other files.
func onlyOutput(t *testing.T, file string) {
	t.Helper()
	names, err := os.ReadDir(filepath.Dir(file))
	if err != nil || len(names) > 1 || len(names) == 1 && names[0].Name() != filepath.Base(file) {
		t.Errorf("files are left: %v, %v", names, err)
	}
}

func TestOutputs(t *testing.T) {
	t.Parallel()
	root, image := store(t, nil, pack(t, tar.Header{Name: "a"}, tar.Header{Name: "b"}), pack(t, tar.Header{Name: ".wh.a"}, tar.Header{Name: "c"}))
	for _, format := range []string{"erofs", "ext4", "tar"} {
		args := []string{"--root", root, "--format", format, image.String()}
		want, errs, err := run(t, args...)
		if err != nil || errs != "" {
			t.Fatalf("%s: %v: %s", format, err, errs)
		}
		file := filepath.Join(t.TempDir(), "image")
		for range 2 { // first a new file, then one that replaces it
			if out, _, err := run(t, append(args, "-o", file)...); err != nil || len(out) > 0 {
				t.Fatalf("%s: %d bytes on standard output: %v", format, len(out), err)
			}
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: the file has %d bytes, standard output had %d: %v", format, len(got), len(want), err)
			}
		}
		onlyOutput(t, file)
		if format == "tar" {
			names := ""
			for r := tar.NewReader(bytes.NewReader(want)); ; {
				h, err := r.Next()
				if err != nil {
					break
				}
				names += h.Name + " "
			}
			if names != "./ b c " {
				t.Errorf("the archive has %s", names)
			}
		}
	}
}

func TestFailures(t *testing.T) {
	t.Parallel()
	good, device := pack(t, tar.Header{Name: "a"}), pack(t, tar.Header{Name: "d", Typeflag: tar.TypeChar})
	blob := func(root string, l []byte) string {
		return filepath.Join(root, "blobs", "sha256", digest.FromBytes(l).Encoded())
	}
	for _, c := range []struct {
		name   string
		diffID digest.Digest
		layer  []byte
		spoil  func(blob string) error
		args   []string
		is     func(error) bool
	}{
		{name: "diff ID", layer: good, diffID: digest.FromString("x"), is: errdefs.IsDataLoss},
		{name: "algorithm", layer: good, diffID: digest.SHA512.FromString("x"), is: errdefs.IsNotImplemented},
		{name: "missing", layer: good, spoil: os.Remove, is: errdefs.IsNotFound},
		{name: "cut short", layer: good, spoil: func(b string) error { return os.Truncate(b, 512) }, is: errdefs.IsDataLoss},
		{name: "entry", layer: pack(t, tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: "b"}), is: errdefs.IsInvalidArgument},
		{name: "strict", layer: device, args: []string{"--strict"}, is: errdefs.IsNotImplemented},
		{name: "memory", layer: good, args: []string{"--max-memory", "1"}, is: errdefs.IsFailedPrecondition},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var diffIDs []digest.Digest
			if c.diffID != "" {
				diffIDs = append(diffIDs, c.diffID)
			}
			root, image := store(t, diffIDs, c.layer)
			if c.spoil != nil {
				if err := c.spoil(blob(root, c.layer)); err != nil {
					t.Fatal(err)
				}
			}
			file := filepath.Join(t.TempDir(), "image")
			for _, format := range []string{"erofs", "ext4", "tar"} {
				args := append([]string{"--root", root, "--format", format, image.String()}, c.args...)
				if out, _, err := run(t, args...); !c.is(err) || len(out) > 0 {
					t.Errorf("%s: %d bytes and %v", format, len(out), err)
				}
				if _, _, err := run(t, append(args, "-o", file)...); !c.is(err) {
					t.Errorf("%s: %v", format, err)
				}
				onlyOutput(t, filepath.Join(filepath.Dir(file), "none"))
			}
		})
	}
	root, image := store(t, nil)
	if _, _, err := run(t, "--root", root, image.String()); !errdefs.IsNotImplemented(err) {
		t.Errorf("an image without layers: %v", err)
	}
	root, image = store(t, nil, device)
	if out, errs, err := run(t, "--root", root, image.String()); err != nil || errs != "dist-disk: left out devices of 1 entries\n" || len(out) == 0 {
		t.Errorf("a device 0:0: %d bytes, %q, %v", len(out), errs, err)
	}
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	root, image := store(t, nil, pack(t, tar.Header{Name: "a"}))
	for _, args := range [][]string{{"--format", "iso"}, {"--format", "tar", "--compress", "zstd"}, {"--format", "squashfs", "--compress", "lzo"},
		{"--compress", "gzip"}, {"--size", "1g"},
		{"--format", "ext4", "--size", "1"}, {"--format", "ext4", "--size", "x"}, {"--format", "ext4", "--size", "9999t"}, {"--format", "ext4", "--size", "16t"}, {"--format", "ext4", "--size", "-1"}, {"-o", "/dev/null"}} {
		if out, _, err := run(t, append(args, "--root", root, image.String())...); !errdefs.IsInvalidArgument(err) || len(out) > 0 {
			t.Errorf("%q: %d bytes and %v", args, len(out), err)
		}
	}
}

// If a program is missing, fails, or does not read everything, that is reported, and nothing is left of its output.
func TestTools(t *testing.T) {
	root, image := store(t, nil, pack(t, tar.Header{Name: strings.Repeat("a", 100)}, tar.Header{Name: "b"}))
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	args := []string{"--root", root, "--format", "squashfs", image.String()}
	if _, err := os.Stat("/usr/sbin/tar2sqfs"); err != nil {
		if _, _, err := run(t, args...); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "squashfs-tools-ng") {
			t.Errorf("without the program: %v", err)
		}
	}
	for _, c := range []struct{ script, want, fails string }{
		{"while read -r _; do :; done; echo made >&3; echo odd >&2", "made\n", ""},
		{"echo made >&3; echo 'no room' >&2; exit 3", "", "tar2sqfs: exit status 3: no room"},
		{"echo made >&3; kill -9 $$", "", "tar2sqfs: signal: killed"},
	} {
		if err := os.WriteFile(filepath.Join(bin, "tar2sqfs"), fmt.Appendf(nil, "#!/bin/bash\n%s\n", c.script), 0o700); err != nil {
			t.Fatal(err)
		}
		out, _, err := run(t, args...)
		if string(out) != c.want || (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %q and %v", c.script, out, err)
		}
		file := filepath.Join(t.TempDir(), "image")
		_, _, err = run(t, append(args, "-o", file)...)
		if got, _ := os.ReadFile(file); string(got) != c.want || (err == nil) != (c.fails == "") {
			t.Errorf("%s: %q and %v", c.script, got, err)
		}
		onlyOutput(t, file)
	}
}

// A program that is too old is refused. The archive for it has nothing that it would misread.
func TestErofsTool(t *testing.T) {
	a, b := tar.Header{Name: "a"}, tar.Header{Name: "b"}
	a.PAXRecords = map[string]string{"SCHILY.xattr.user.x%3Dy": "1", "SCHILY.xattr.user.z": "2"}
	b.PAXRecords = map[string]string{"SCHILY.xattr.user.%": "3"}
	root, image := store(t, nil, pack(t, a, b))
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	file := filepath.Join(t.TempDir(), "image")
	args := []string{"--root", root, "--compress", "zstd", "-o", file, image.String()}
	for version, is := range map[string]func(error) bool{
		"1.7.1": errdefs.IsNotImplemented, "1.8": nil, "1.10.2": nil, "2.0": nil,
		"": func(err error) bool { return err != nil && strings.Contains(err.Error(), "no version") },
	} {
		script := "#!/bin/bash\n[[ $1 != -V ]] || { echo 'mkfs.erofs (erofs-utils) " + version + "'; exit; }\ncat >&3\nprintf '%s ' \"$@\" $SOURCE_DATE_EPOCH >>/dev/fd/3\n"
		if err := os.WriteFile(filepath.Join(bin, "mkfs.erofs"), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		_, errs, err := run(t, args...)
		if is != nil {
			if !is(err) {
				t.Errorf("version %q: %v", version, err)
			}
			onlyOutput(t, filepath.Join(filepath.Dir(file), "none"))
			continue
		}
		made, _ := os.ReadFile(file)
		if err != nil || errs != "dist-disk: left out user attributes of 1 entries\n" || bytes.Contains(made, []byte("user.x")) ||
			!bytes.Contains(made, []byte("SCHILY.xattr.user.z=2")) || !bytes.Contains(made, []byte("SCHILY.xattr.user.%=3")) {
			t.Errorf("version %q: %d bytes, %q, %v", version, len(made), errs, err)
		}
		if options := string(made[bytes.LastIndexByte(made, 0)+1:]); !strings.HasPrefix(options, "-d0 --quiet --tar=f -zzstd ") || !strings.HasSuffix(options, " /dev/fd/3 ") {
			t.Errorf("it is called with %q", options)
		}
		_ = os.Remove(file)
	}
}
