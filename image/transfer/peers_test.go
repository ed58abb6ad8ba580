package transfer_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/image"
	"distkit/image/transfer"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// peer runs another tool, from PATH or from the directory where scripts/bench keeps the tools that it compares.
// TEST_REQUIRE, a list with commas, can require it.
func peer(t *testing.T, name string) func(args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		dir := os.Getenv("PEERS")
		if cache, cerr := os.UserCacheDir(); dir == "" && cerr == nil {
			dir = filepath.Join(cache, "distkit-peers")
		}
		path = filepath.Join(dir, name)
		_, err = os.Stat(path)
	}
	if err != nil {
		if slices.Contains(strings.FieldsFunc(os.Getenv("TEST_REQUIRE"), func(r rune) bool { return r == ',' || r == ' ' }), name) {
			t.Fatalf("no %s, which TEST_REQUIRE demands", name)
		}
		t.Skipf("no %s", name)
	}
	return func(args ...string) string {
		t.Helper()
		out, err := exec.Command(path, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
}

// exported is a store with two images, one of them an index of which one manifest is stored, and the file to which they
// were exported.
func exported(t *testing.T, o transfer.ExportOptions) (w *world, amd v1.Descriptor, file string) {
	t.Helper()
	w = newWorld(t)
	amd = w.image("amd64", "base", "amd")
	arm := w.image("arm64", "base", "arm")
	w.name("example.org/x:1", w.index(amd, arm))
	w.name("docker.io/library/y:2", w.image("amd64", "base", "y"))
	w.delete(arm.Digest)
	file = filepath.Join(t.TempDir(), "ours.tar")
	if err := os.WriteFile(file, w.mustSave(o, "example.org/x:1", "docker.io/library/y:2"), 0o644); err != nil {
		t.Fatal(err)
	}
	return w, amd, file
}

func TestSkopeoReadsWhatExportWrites(t *testing.T) {
	skopeo := peer(t, "skopeo")
	for name, o := range map[string]transfer.ExportOptions{"platform": {}, "sparse": {Select: transfer.Sparse}} {
		t.Run(name, func(t *testing.T) {
			_, amd, file := exported(t, o)
			for i, src := range []string{"oci-archive:" + file + ":1", "docker-archive:" + file + ":example.org/x:1", "docker-archive:" + file + ":y:2"} {
				dst := filepath.Join(t.TempDir(), "layout")
				skopeo("--override-arch", "amd64", "copy", src, "oci:"+dst+":copied")
				if _, err := os.Stat(filepath.Join(dst, "blobs", "sha256", amd.Digest.Encoded())); i == 0 && err != nil {
					t.Errorf("%s: the manifest is another one: %v", src, err)
				}
			}
		})
	}
}

// Docker's manifests keep their form.
func TestSkopeoReadsDockerManifests(t *testing.T) {
	skopeo := peer(t, "skopeo")
	w := newWorld(t)
	cfg, layers := config(t, "amd64", "one")
	const docker = "application/vnd.docker."
	m := w.putJSON(docker+"distribution.manifest.v2+json", v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: docker + "distribution.manifest.v2+json",
		Config: w.put(docker+"container.image.v1+json", cfg, digest.SHA256),
		Layers: []v1.Descriptor{w.put(docker+"image.rootfs.diff.tar.gzip", gz(t, layers[0]), digest.SHA256)},
	})
	w.name("docker.io/library/x:1", m)
	file := filepath.Join(t.TempDir(), "ours.tar")
	if err := os.WriteFile(file, w.mustSave(transfer.ExportOptions{}, "docker.io/library/x:1"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, src := range []string{"oci-archive:" + file, "docker-archive:" + file, "docker-archive:" + file + ":x:1"} {
		skopeo("--override-arch", "amd64", "copy", src, "dir:"+filepath.Join(t.TempDir(), "dir"))
	}
}

func TestImportReadsWhatSkopeoWrites(t *testing.T) {
	skopeo := peer(t, "skopeo")
	from, amd, file := exported(t, transfer.ExportOptions{})
	dir := t.TempDir()
	for name, c := range map[string]struct {
		dst  string
		o    transfer.ImportOptions
		want string
		same bool // the manifest has the same bytes
	}{
		"OCI with a name":    {"oci-archive:FILE:example.org/x:1", transfer.ImportOptions{}, "example.org/x:1", true},
		"OCI with a tag":     {"oci-archive:FILE:1", transfer.ImportOptions{BaseName: "b"}, "b:1", true},
		"OCI without a name": {"oci-archive:FILE", transfer.ImportOptions{Name: "n"}, "n", true},
		"docker":             {"docker-archive:FILE:example.org/x:1", transfer.ImportOptions{}, "example.org/x:1", false},
		"docker, familiar":   {"docker-archive:FILE:x:1", transfer.ImportOptions{}, "docker.io/library/x:1", false},
		"docker, nameless":   {"docker-archive:FILE", transfer.ImportOptions{Name: "n"}, "n", false},
	} {
		t.Run(name, func(t *testing.T) {
			archive := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			skopeo("copy", "oci-archive:"+file+":1", strings.Replace(c.dst, "FILE", archive, 1))
			b, err := os.ReadFile(archive)
			if err != nil {
				t.Fatal(err)
			}
			to := newWorld(t)
			got := to.mustLoad(b, c.o)
			img, err := to.names.Get(c.want)
			if err != nil {
				t.Fatalf("%v; named are %q", err, got)
			}
			if c.same && img.Target.Digest != amd.Digest {
				t.Errorf("digest %s, want %s", img.Target.Digest, amd.Digest)
			}
			sameLayers(t, from, amd, to, img.Target)
		})
	}
}

func TestCraneReadsWhatExportWritesAndBack(t *testing.T) {
	crane := peer(t, "crane")
	dir := t.TempDir()
	layer := filepath.Join(dir, "layer.tar")
	if err := os.WriteFile(layer, archiveOf(t, entry{name: "etc/motd", body: "hello"}), 0o644); err != nil {
		t.Fatal(err)
	}
	theirs := filepath.Join(dir, "theirs.tar")
	crane("append", "--oci-empty-base", "-f", layer, "-f", layer, "-t", "docker.io/library/c:1", "-o", theirs)
	b, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.mustLoad(b, transfer.ImportOptions{})
	img, err := w.names.Get("docker.io/library/c:1")
	if err != nil {
		t.Fatal(err)
	}
	if layers, err := (image.Walker{Store: w.store}).Layers(t.Context(), img.Target); err != nil || len(layers) != 2 {
		t.Errorf("layers %+v, %v", layers, err)
	}
	ours := filepath.Join(dir, "ours.tar")
	if err := os.WriteFile(ours, w.mustSave(transfer.ExportOptions{}, "docker.io/library/c:1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := crane("validate", "--tarball", ours); !strings.Contains(out, "PASS") {
		t.Errorf("crane validate: %s", out)
	}
}

// sameLayers compares the diff IDs of the layers, and both configs.
func sameLayers(t *testing.T, a *world, x v1.Descriptor, b *world, y v1.Descriptor) {
	t.Helper()
	one, err := (image.Walker{Store: a.store}).Layers(t.Context(), x)
	if err != nil {
		t.Fatal(err)
	}
	other, err := (image.Walker{Store: b.store}).Layers(t.Context(), y)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.EqualFunc(one, other, func(l, m image.Layer) bool { return l.ChainID == m.ChainID }) {
		t.Errorf("layers\n %+v\n %+v", one, other)
	}
	c, err := (image.Walker{Store: a.store}).Config(t.Context(), x)
	if err != nil {
		t.Fatal(err)
	}
	d, err := (image.Walker{Store: b.store}).Config(t.Context(), y)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c, d) {
		t.Errorf("configs\n %s\n %s", c, d)
	}
}
