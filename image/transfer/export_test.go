package transfer_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/image"
	"distkit/image/transfer"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func (w *world) save(o transfer.ExportOptions, names ...string) ([]byte, error) {
	w.t.Helper()
	var images []image.Image
	for _, name := range names {
		img, err := w.names.Get(name)
		if err != nil {
			w.t.Fatal(err)
		}
		images = append(images, img)
	}
	if o.Platform == nil {
		o.Platform = only(w.t, "linux/amd64")
	}
	var b bytes.Buffer
	err := transfer.Export(w.t.Context(), w.store, &b, images, o)
	return b.Bytes(), err
}

func (w *world) mustSave(o transfer.ExportOptions, names ...string) []byte {
	w.t.Helper()
	b, err := w.save(o, names...)
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// contents returns the entries of an archive, and the names in its index.json and manifest.json.
func contents(t *testing.T, archive []byte) (names []string, index v1.Index, docker []dockerImage) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return names, index, docker
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(time.Unix(0, 0)) || h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s: time %v, owner %d:%d %s", h.Name, h.ModTime, h.Uid, h.Gid, h.Uname)
		}
		names = append(names, h.Name)
		var into any
		switch h.Name {
		case "index.json":
			into = &index
		case "manifest.json":
			into = &docker
		default:
			continue
		}
		if err := json.NewDecoder(r).Decode(into); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	w := newWorld(t)
	a, b, c := w.image("amd64", "base", "a"), w.image("amd64", "base", "b"), w.image("arm64", "base", "c")
	w.name("docker.io/library/a:1", annotated(a, "vendor", "me", "note", "x"))
	w.name("docker.io/library/a:latest", a)
	w.name("example.org/b:1", b)
	w.name("example.org/all:1", w.index(b, c))
	w.name("bare", a)
	names := []string{"bare", "example.org/all:1", "docker.io/library/a:1", "docker.io/library/a:latest", "example.org/b:1"}
	archive := w.mustSave(transfer.ExportOptions{}, names...)

	slices.Reverse(names)
	if again := w.mustSave(transfer.ExportOptions{}, append(names, "bare")...); !bytes.Equal(archive, again) {
		t.Error("the same images in another order give another archive")
	}

	to := newWorld(t)
	to.mustLoad(archive, transfer.ImportOptions{})
	equal(t, to.list(), w.list()...)
	if !slices.Equal(to.digests(), w.digests()) {
		t.Errorf("blobs %v, want %v", to.digests(), w.digests())
	}
	img, err := to.names.Get("docker.io/library/a:1")
	if err != nil {
		t.Fatal(err)
	}
	if img.Labels["vendor"] != "me" || img.Labels["note"] != "x" || len(img.Labels) != 2 {
		t.Errorf("labels %v", img.Labels)
	}
	if again := to.mustSave(transfer.ExportOptions{}, names...); !bytes.Equal(archive, again) {
		t.Error("export, import, export gives another archive")
	}
}

func TestExportEntries(t *testing.T) {
	w := newWorld(t)
	a := w.image("amd64", "base", "a")
	w.name("docker.io/library/a:1", a)
	w.name("docker.io/library/b:1", a)
	w.name("example.org/a:2@"+string(a.Digest), a)
	w.name("example.org/a@"+string(a.Digest), a)
	w.name("Not a reference"[0:3]+"-", a)
	names, index, docker := contents(t, w.mustSave(transfer.ExportOptions{},
		"docker.io/library/a:1", "docker.io/library/b:1", "example.org/a:2@"+string(a.Digest), "example.org/a@"+string(a.Digest), "Not-"))
	if !slices.Equal(names[:5], []string{"oci-layout", "index.json", "manifest.json", "blobs/", "blobs/sha256/"}) || !slices.IsSorted(names[5:]) || len(names) != 9 {
		t.Errorf("entries %q", names)
	}
	want := map[string]string{
		"docker.io/library/a:1": "docker.io/library/a:1", // two names have the tag 1
		"docker.io/library/b:1": "docker.io/library/b:1",
		"Not-":                  "Not-",
	}
	refs := map[string]string{}
	for _, d := range index.Manifests {
		refs[d.Annotations[transfer.AnnotationImageName]] = d.Annotations[v1.AnnotationRefName]
	}
	for name, ref := range want {
		if refs[name] != ref {
			t.Errorf("ref name of %s is %q, not %q", name, refs[name], ref)
		}
	}
	if ref := refs["example.org/a:2@"+string(a.Digest)]; ref != "2@"+string(a.Digest) {
		t.Errorf("ref name %q", ref)
	}
	if len(docker) != 1 || !slices.Equal(docker[0].RepoTags, []string{"a:1", "b:1", "example.org/a:2"}) || len(docker[0].Layers) != 2 {
		t.Errorf("manifest.json %+v", docker)
	}
	for _, name := range append(docker[0].Layers, docker[0].Config) {
		if !slices.Contains(names, name) {
			t.Errorf("manifest.json names %s, which isn't there", name)
		}
	}
	_, index, _ = contents(t, w.mustSave(transfer.ExportOptions{}, "docker.io/library/a:1"))
	if ref := index.Manifests[0].Annotations[v1.AnnotationRefName]; ref != "1" {
		t.Errorf("ref name of the only one is %q", ref)
	}
}

func TestExportNothing(t *testing.T) {
	w := newWorld(t)
	archive := w.mustSave(transfer.ExportOptions{})
	equal(t, newWorld(t).mustLoad(archive, transfer.ImportOptions{}))
}

func TestExportPlatforms(t *testing.T) {
	w := newWorld(t)
	amd, arm := w.image("amd64", "base", "amd"), w.image("arm64", "base", "arm")
	index := w.index(amd, arm)
	w.name("x:1", index)
	arm64, s390x := only(t, "linux/arm64"), only(t, "linux/s390x")

	type want struct {
		target digest.Digest
		blobs  int
		docker bool
		class  func(error) bool
	}
	check := func(name string, o transfer.ExportOptions, want want) {
		t.Helper()
		archive, err := w.save(o, "x:1")
		if want.class != nil {
			if !want.class(err) || len(archive) > 0 {
				t.Errorf("%s: error %v, %d bytes", name, err, len(archive))
			}
			return
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		names, index, docker := contents(t, archive)
		blobs := 0
		for _, n := range names {
			if strings.HasPrefix(n, "blobs/sha256/") && n != "blobs/sha256/" {
				blobs++
			}
		}
		if index.Manifests[0].Digest != want.target || blobs != want.blobs || (docker != nil) != want.docker {
			t.Errorf("%s: %s with %d blobs, docker %v; want %+v", name, index.Manifests[0].Digest, blobs, docker, want)
		}
		equal(t, newWorld(t).mustLoad(archive, transfer.ImportOptions{}), "x:1 "+string(want.target))
	}
	one, all, sparse := transfer.One, transfer.All, transfer.Sparse
	check("whole", transfer.ExportOptions{}, want{index.Digest, 8, true, nil})
	check("whole, for another", transfer.ExportOptions{Platform: s390x}, want{index.Digest, 8, false, nil})
	check("whole, all", transfer.ExportOptions{Select: all}, want{index.Digest, 8, true, nil})
	check("whole, sparse", transfer.ExportOptions{Select: sparse}, want{index.Digest, 8, true, nil})
	check("one", transfer.ExportOptions{Select: one, Platform: arm64}, want{arm.Digest, 4, true, nil})
	check("one that isn't there", transfer.ExportOptions{Select: one, Platform: s390x}, want{class: errdefs.IsNotFound})

	children, err := image.Walker{Store: w.store}.Children(t.Context(), arm)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{children[2].Digest, children[0].Digest, arm.Digest} {
		w.delete(d)
		check("gaps", transfer.ExportOptions{}, want{amd.Digest, 4, true, nil})
		check("gaps, all", transfer.ExportOptions{Select: all}, want{class: errdefs.IsNotFound})
		check("gaps, sparse", transfer.ExportOptions{Select: sparse}, want{index.Digest, 5, true, nil})
		check("gaps, the other", transfer.ExportOptions{Platform: arm64}, want{class: errdefs.IsNotFound})
		check("gaps, the other alone", transfer.ExportOptions{Select: one, Platform: arm64}, want{class: errdefs.IsNotFound})
	}
	w.delete(amd.Digest)
	check("nothing", transfer.ExportOptions{}, want{class: errdefs.IsNotFound})
	check("nothing, sparse", transfer.ExportOptions{Select: sparse}, want{class: errdefs.IsNotFound})
}

func TestExportOfAnArtifactIsNotForDocker(t *testing.T) {
	w := newWorld(t)
	w.name("x:1", w.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
		MediaType: v1.MediaTypeImageManifest, ArtifactType: "application/x",
		Config: w.put(v1.MediaTypeEmptyJSON, []byte("{}"), digest.SHA256),
		Layers: []v1.Descriptor{w.put("application/x", []byte("x"), digest.SHA256)},
	}))
	w.name("y:1", w.image("amd64", "y"))
	if _, _, docker := contents(t, w.mustSave(transfer.ExportOptions{}, "x:1")); docker != nil {
		t.Errorf("manifest.json %+v", docker)
	}
	if _, _, docker := contents(t, w.mustSave(transfer.ExportOptions{}, "x:1", "y:1")); len(docker) != 1 {
		t.Errorf("manifest.json %+v", docker)
	}
}

func TestExportWithoutAForeignLayer(t *testing.T) {
	w := newWorld(t)
	cfg, layers := config(t, "amd64", "away", "one")
	away := v1.Descriptor{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromString("away"), Size: 4}
	m := w.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
		MediaType: v1.MediaTypeImageManifest, Config: w.put(v1.MediaTypeImageConfig, cfg, digest.SHA256),
		Layers: []v1.Descriptor{away, w.put(v1.MediaTypeImageLayer, layers[1], digest.SHA256)},
	})
	w.name("x:1", m)
	archive := w.mustSave(transfer.ExportOptions{}, "x:1")
	if _, _, docker := contents(t, archive); docker != nil {
		t.Errorf("manifest.json %+v", docker)
	}
	newWorld(t).mustLoad(archive, transfer.ImportOptions{})
}

func TestExportFailures(t *testing.T) {
	w := newWorld(t)
	m := w.image("amd64", "one", "two")
	w.name("x:1", m)
	w.entry("blob:1", w.put("application/json", []byte("{}"), digest.SHA256))
	w.entry("gone:1", v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4})
	if b, err := w.save(transfer.ExportOptions{}, "blob:1"); !errdefs.IsInvalidArgument(err) || len(b) > 0 {
		t.Errorf("what is no image: %v", err)
	}
	if b, err := w.save(transfer.ExportOptions{}, "x:1", "gone:1"); !errdefs.IsNotFound(err) || len(b) > 0 {
		t.Errorf("a manifest that is missing: %v", err)
	}
	children, err := image.Walker{Store: w.store}.Children(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	path, err := w.store.Path(children[2].Digest)
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	rewrite(t, path, bad)
	archive, err := w.save(transfer.ExportOptions{}, "x:1")
	if !errdefs.IsDataLoss(err) {
		t.Errorf("a corrupt blob: %v", err)
	}
	to := newWorld(t)
	if _, err := to.load(archive, transfer.ImportOptions{}); !errdefs.IsDataLoss(err) {
		t.Errorf("the archive that came of it: %v", err)
	}
	equal(t, to.list())
	rewrite(t, path, good[1:])
	if b, err := w.save(transfer.ExportOptions{}, "x:1"); !errdefs.IsDataLoss(err) || len(b) > 0 {
		t.Errorf("a blob of another size: %v", err)
	}
	rewrite(t, path, good)
	full := errors.New("disk full")
	img, err := w.names.Get("x:1")
	if err != nil {
		t.Fatal(err)
	}
	err = transfer.Export(t.Context(), w.store, failingWriter{full}, []image.Image{img}, transfer.ExportOptions{Platform: only(t, "linux/amd64")})
	if !errors.Is(err, full) {
		t.Errorf("a write that fails: %v", err)
	}
}

type failingWriter struct{ err error }

func (f failingWriter) Write([]byte) (int, error) { return 0, f.err }

func rewrite(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o444); err != nil {
		t.Fatal(err)
	}
}
