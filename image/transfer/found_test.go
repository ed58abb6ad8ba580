package transfer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/image"
	"distkit/image/transfer"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// unpackable fails the test unless the documents of the image with that name say that it can be unpacked.
func (w *world) unpackable(name string) {
	w.t.Helper()
	img, err := w.names.Get(name)
	if err != nil {
		w.t.Error(err)
		return
	}
	if _, err := (image.Walker{Store: w.store, Platform: only(w.t, "linux/amd64")}).Layers(w.t.Context(), img.Target); err != nil {
		w.t.Errorf("layers of %s: %v", name, err)
	}
}

// Archives whose layout lacks objects that their manifest.json has. docker 25.0.0-rc wrote manifests without layers,
// and docker 25 writes an index.json without manifests for an image that is saved by its ID.
func TestImportWhatOnlyManifestJSONHas(t *testing.T) {
	cfg, layers := config(t, "amd64", "one")
	blob := func(b []byte) entry {
		return entry{name: "blobs/sha256/" + digest.FromBytes(b).Encoded(), body: string(b)}
	}
	docker := func(tags string) entry {
		return entry{name: "manifest.json", body: fmt.Sprintf(`[{"Config":%q,"RepoTags":%s,"Layers":[%q]}]`, blob(cfg).name, tags, blob(layers[0]).name)}
	}
	manifest := func(layers string) []byte {
		return fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":%d}%s}`,
			v1.MediaTypeImageManifest, v1.MediaTypeImageConfig, digest.FromBytes(cfg), len(cfg), layers)
	}
	for _, layersOf := range []string{"", `,"layers":null`, `,"layers":[]`} {
		m := manifest(layersOf)
		entries := []entry{{name: "oci-layout", body: `{"imageLayoutVersion":"1.0.0"}`}, blob(cfg), blob(layers[0]), blob(m),
			{name: "index.json", body: fmt.Sprintf(`{"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"io.containerd.image.name":"docker.io/library/x:1"}}]}`,
				v1.MediaTypeImageManifest, digest.FromBytes(m), len(m))}}
		to := newWorld(t)
		to.mustLoad(archiveOf(t, append(entries, docker(`["x:1"]`))...), transfer.ImportOptions{})
		to.unpackable("docker.io/library/x:1")
		to = newWorld(t)
		if _, err := to.load(archiveOf(t, entries...), transfer.ImportOptions{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "can't be unpacked") {
			t.Errorf("layers %q without manifest.json: %v", layersOf, err)
		}
		equal(t, to.list())
	}
	for _, index := range []string{`{"schemaVersion":2,"manifests":null}`, `{"schemaVersion":2,"manifests":[]}`, `{"schemaVersion":2}`} {
		entries := []entry{{name: "oci-layout", body: `{"imageLayoutVersion":"1.0.0"}`}, blob(cfg), blob(layers[0]), {name: "index.json", body: index}}
		saved := archiveOf(t, append(entries, docker("null"))...)
		to := newWorld(t)
		to.mustLoad(saved, transfer.ImportOptions{Name: "example.org/hello:1"})
		to.unpackable("example.org/hello:1")
		if _, err := newWorld(t).load(saved, transfer.ImportOptions{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("no name: %v", err)
		}
		if _, err := newWorld(t).load(archiveOf(t, entries...), transfer.ImportOptions{Name: "x"}); !errdefs.IsNotFound(err) {
			t.Errorf("a name and no image: %v", err)
		}
	}
}

// An artifact may have the type of an image config, but no rootfs in it.
func TestImportArtifactsWithoutRootFS(t *testing.T) {
	from := newWorld(t)
	m := from.putJSON(v1.MediaTypeImageManifest, v1.Manifest{
		MediaType: v1.MediaTypeImageManifest,
		Config:    from.put(v1.MediaTypeImageConfig, []byte("{}"), digest.SHA256),
		Layers:    []v1.Descriptor{from.put("application/wasm", []byte("x"), digest.SHA256)},
	})
	newWorld(t).mustLoad(archiveOf(t, from.layout(annotated(m, v1.AnnotationRefName, "x:1"))...), transfer.ImportOptions{})
}

// If a descriptor's type is unusual or missing, the blob decides, at every level.
func TestImportTypesByContent(t *testing.T) {
	for _, odd := range []string{"", "text/plain", "application/octet-stream"} {
		from := newWorld(t)
		m := from.image("amd64", "one")
		m.MediaType = odd
		index := from.index(m)
		index.MediaType = odd
		to := newWorld(t)
		to.mustLoad(archiveOf(t, from.layout(annotated(index, v1.AnnotationRefName, "x:1"))...), transfer.ImportOptions{})
		if img, err := to.names.Get("x:1"); err != nil || img.Target.MediaType != v1.MediaTypeImageIndex {
			t.Errorf("%q: %+v, %v", odd, img, err)
		}
		archive := to.mustSave(transfer.ExportOptions{}, "x:1")
		again := newWorld(t)
		again.mustLoad(archive, transfer.ImportOptions{})
		if !slices.Equal(again.digests(), from.digests()) {
			t.Errorf("%q: blobs %v, want %v", odd, again.digests(), from.digests())
		}
	}
}

// docker save --platform writes the manifest and config of an attestation, but not its statement.
func TestImportAttestationInPart(t *testing.T) {
	from := newWorld(t)
	m := from.image("amd64", "one")
	cfg, _ := config(t, "unknown", "statement")
	statement := from.put("application/vnd.in-toto+json", []byte("{}"), digest.SHA256)
	att := from.putJSON(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest,
		Config: from.put(v1.MediaTypeImageConfig, cfg, digest.SHA256), Layers: []v1.Descriptor{statement}})
	att.Platform = &v1.Platform{OS: "unknown", Architecture: "unknown"}
	index := from.index(m, att)
	from.delete(statement.Digest)
	saved := archiveOf(t, from.layout(annotated(index, v1.AnnotationRefName, "x:1"))...)
	to := newWorld(t)
	to.mustLoad(saved, transfer.ImportOptions{})
	to.unpackable("x:1")
	missing, err := image.Walker{Store: to.store}.Missing(t.Context(), index)
	if err != nil || len(missing) != 1 || missing[0].Digest != statement.Digest {
		t.Errorf("missing %v, %v", missing, err)
	}
	if _, err := newWorld(t).load(saved, transfer.ImportOptions{Select: transfer.All}); !errdefs.IsDataLoss(err) {
		t.Errorf("all of it: %v", err)
	}
	alone := from.index(att)
	if _, err := newWorld(t).load(archiveOf(t, from.layout(annotated(alone, v1.AnnotationRefName, "x:1"))...), transfer.ImportOptions{}); !errdefs.IsDataLoss(err) {
		t.Errorf("an attestation in part alone: %v", err)
	}
}

// Names as buildpack tools write them, files whose names say nothing, and layers that a reader is expected to have.
func TestImportDockerNames(t *testing.T) {
	cfg, layers := config(t, "amd64", "one", "two")
	docker := func(config string, layers ...string) entry {
		return entry{name: "manifest.json", body: string(asJSON(t, []dockerImage{{Config: config, RepoTags: []string{"x:1"}, Layers: layers}}))}
	}
	for name, entries := range map[string][]entry{
		"absolute in both": {{name: "c.json", body: string(cfg)}, {name: "/a.tar", body: string(layers[0])}, {name: "/b.tar", body: string(layers[1])}, docker("c.json", "/a.tar", "/b.tar")},
		"all absolute":     {{name: "/c.json", body: string(cfg)}, {name: "/a.tar", body: string(layers[0])}, {name: "/b.tar", body: string(layers[1])}, docker("/c.json", "/a.tar", "/b.tar")},
		"listed first":     {docker("c", "/a", "//b"), {name: "c", body: string(cfg)}, {name: "a", body: string(layers[0])}, {name: "/b", body: string(layers[1])}},
		"listed last":      {{name: "the config", body: string(cfg)}, {name: "a", body: string(layers[0])}, {name: "b", body: string(zst(t, layers[1]))}, docker("the config", "a", "b")},
		"a stray slash":    {{name: "/", kind: tar.TypeDir}, {name: "c.json", body: string(cfg)}, {name: "a.tar", body: string(layers[0])}, {name: "b.tar", body: string(layers[1])}, docker("c.json", "a.tar", "b.tar")},
	} {
		t.Run(name, func(t *testing.T) {
			to := newWorld(t)
			to.mustLoad(archiveOf(t, entries...), transfer.ImportOptions{})
			to.unpackable("docker.io/library/x:1")
		})
	}
	left := archiveOf(t, entry{name: "c.json", body: string(cfg)}, entry{name: "b.tar", body: string(layers[1])}, docker("c.json", "", "b.tar"))
	if _, err := newWorld(t).load(left, transfer.ImportOptions{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "layer 1") {
		t.Errorf("an empty name: %v", err)
	}
	to := newWorld(t)
	to.put(v1.MediaTypeImageLayer, layers[0], digest.SHA256)
	to.mustLoad(left, transfer.ImportOptions{})
	to.unpackable("docker.io/library/x:1")

	link := archiveOf(t, entry{name: "c.json", body: string(cfg)}, entry{name: "d/layer.tar", kind: tar.TypeSymlink, link: "../gone.tar"},
		entry{name: "b.tar", body: string(layers[1])}, docker("c.json", "d/layer.tar", "b.tar"))
	if _, err := newWorld(t).load(link, transfer.ImportOptions{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "d/layer.tar") || !strings.Contains(err.Error(), "gone.tar") {
		t.Errorf("a link to nothing: %v", err)
	}
}

// skip is a skippable frame. pzstd and seekable writers put one at the beginning.
const skip = "\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"

func TestImportCompressions(t *testing.T) {
	l := newLegacy(t)
	l.image([]string{"x:1"}, "one", "two")
	plain := archiveOf(t, l.all()...)
	program := func(name string) []byte {
		t.Helper()
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not on PATH", name)
		}
		c := exec.Command(name, "-c")
		c.Stdin = bytes.NewReader(plain)
		out, err := c.Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for name, compress := range map[string]func() []byte{
		"skippable frame": func() []byte { return append([]byte(skip), zst(t, plain)...) },
		"bzip2":           func() []byte { return program("bzip2") },
		"xz":              func() []byte { return program("xz") },
	} {
		t.Run(name, func(t *testing.T) {
			b := compress()
			to := newWorld(t)
			to.mustLoad(b, transfer.ImportOptions{})
			to.unpackable("docker.io/library/x:1")
			for _, n := range []int{len(b) - 1, len(b) / 2} {
				if _, err := newWorld(t).load(b[:n], transfer.ImportOptions{}); !errdefs.IsDataLoss(err) {
					t.Errorf("%d bytes of %d: %v", n, len(b), err)
				}
			}
			b[len(b)/2] ^= 0xff
			if _, err := newWorld(t).load(b, transfer.ImportOptions{}); err == nil {
				t.Error("damage was not noticed")
			}
		})
	}
	zeros := strings.Repeat("\x00", 2000)
	for name, head := range map[string]string{
		"lz4": "\x04\x22\x4d\x18\x64\x40\xa7", "lzma": "\x5d\x00\x00\x80\x00\xff\xff\xff\xff\xff\xff\xff\xff", "lzip": "LZIP\x01\x0c", "compress": "\x1f\x9d\x90",
	} {
		if _, err := newWorld(t).load([]byte(head+zeros), transfer.ImportOptions{}); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		cfg, _ := config(t, "amd64", "one")
		layer := archiveOf(t, entry{name: "c.json", body: string(cfg)}, entry{name: "l.tar", body: head + zeros},
			entry{name: "manifest.json", body: `[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`})
		if _, err := newWorld(t).load(layer, transfer.ImportOptions{}); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), name) {
			t.Errorf("a layer in %s: %v", name, err)
		}
	}
}

// A layer in docker's archives that begins with a skippable frame is zstd, as it is for the code that unpacks it.
func TestImportLayerWithSkippableFrame(t *testing.T) {
	cfg, layers := config(t, "amd64", "one")
	to := newWorld(t)
	to.mustLoad(archiveOf(t, entry{name: "c.json", body: string(cfg)}, entry{name: "l.tar", body: skip + string(zst(t, layers[0]))},
		entry{name: "manifest.json", body: `[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`}), transfer.ImportOptions{})
	img, err := to.names.Get("docker.io/library/x:1")
	if err != nil {
		t.Fatal(err)
	}
	got, err := image.Walker{Store: to.store}.Layers(t.Context(), img.Target)
	if err != nil || got[0].MediaType != v1.MediaTypeImageLayerZstd {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestImportOnly(t *testing.T) {
	from := newWorld(t)
	a, b, c := from.image("amd64", "a"), from.image("amd64", "b"), from.image("amd64", "c")
	full, ref := transfer.AnnotationImageName, v1.AnnotationRefName
	layout := archiveOf(t, from.layout(annotated(a, full, "docker.io/library/a:1", ref, "1"), annotated(b, full, "docker.io/library/b:1"), annotated(c, ref, "7"), c)...)
	l := newLegacy(t)
	l.image([]string{"a:1"}, "a")
	l.image([]string{"b:1", "b:2"}, "b")
	l.images = append(l.images, dockerImage{Config: "gone.json", RepoTags: []string{"gone:1"}})
	docker := archiveOf(t, l.all()...)
	at := func(d v1.Descriptor) string { return " " + string(d.Digest) }
	for _, o := range []struct {
		o    transfer.ImportOptions
		want []string
	}{
		{transfer.ImportOptions{Only: []string{"docker.io/library/b:1"}}, []string{"docker.io/library/b:1" + at(b)}},
		{transfer.ImportOptions{Only: []string{"b:1", "a:1"}}, []string{"docker.io/library/a:1" + at(a), "docker.io/library/b:1" + at(b)}},
		{transfer.ImportOptions{Only: []string{string(b.Digest)}, Name: "n:1"}, []string{"n:1" + at(b)}},
		{transfer.ImportOptions{Only: []string{"7"}, BaseName: "n"}, []string{"n:7" + at(c)}},
	} {
		equal(t, newWorld(t).mustLoad(layout, o.o), o.want...)
	}
	for _, archive := range [][]byte{layout, docker} {
		to := newWorld(t)
		if _, err := to.load(archive, transfer.ImportOptions{Only: []string{"a:1", "none:1"}}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "none:1") {
			t.Errorf("none: %v", err)
		}
		equal(t, to.list())
	}
	to := newWorld(t)
	to.mustLoad(docker, transfer.ImportOptions{Only: []string{"b:2"}}) // that gone is incomplete does not concern it
	to.unpackable("docker.io/library/b:2")
	if len(to.list()) != 1 {
		t.Errorf("named: %q", to.list())
	}
}

// An image whose digest has an unknown algorithm fails the import only if the import asks for it.
func TestImportBesideAnUnknownAlgorithm(t *testing.T) {
	from := newWorld(t)
	a := annotated(from.image("amd64", "a"), v1.AnnotationRefName, "x:1")
	strange := annotated(v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.Digest("sha384:" + strings.Repeat("0", 96)), Size: 1}, v1.AnnotationRefName, "x:2")
	archive := archiveOf(t, from.layout(strange, a)...)
	equal(t, newWorld(t).mustLoad(archive, transfer.ImportOptions{Only: []string{"x:1"}}), "x:1 "+string(a.Digest))
	for _, only := range [][]string{nil, {"x:2"}} {
		if _, err := newWorld(t).load(archive, transfer.ImportOptions{Only: only}); !errdefs.IsNotImplemented(err) {
			t.Errorf("%v: %v", only, err)
		}
	}
	if listed, err := transfer.List(t.Context(), transfer.Stream(bytes.NewReader(archive)), transfer.ImportOptions{}); err != nil || len(listed) != 2 {
		t.Errorf("%v, %v", listed, err)
	}
}

func TestList(t *testing.T) {
	from := newWorld(t)
	a := from.image("amd64", "a")
	from.name("x:1", annotated(a, "vendor", "me"))
	l := newLegacy(t)
	l.image([]string{"a:1", "b:1"}, "a", "b")
	l.image(nil, "c")
	for _, archive := range [][]byte{from.mustSave(transfer.ExportOptions{}, "x:1"), archiveOf(t, l.all()...)} {
		listed, err := transfer.List(t.Context(), transfer.Stream(bytes.NewReader(archive)), transfer.ImportOptions{})
		if err != nil {
			t.Fatal(err)
		}
		to := newWorld(t)
		var got, want []string
		for _, img := range listed {
			if img.Name != "" {
				got = append(got, img.Name+" "+string(img.Target.Digest))
			}
		}
		want = to.mustLoad(archive, transfer.ImportOptions{})
		equal(t, got, want...)
	}
	if _, err := transfer.List(t.Context(), transfer.Stream(bytes.NewReader(archiveOf(t, l.all()...)[:3000])), transfer.ImportOptions{}); !errdefs.IsDataLoss(err) {
		t.Errorf("truncated: %v", err)
	}
}

// unpack writes the entries of an archive as files.
func unpack(t *testing.T, entries []entry) string {
	t.Helper()
	dir := t.TempDir()
	for _, e := range entries {
		name := filepath.Join(dir, e.name)
		err := os.MkdirAll(filepath.Dir(name), 0o755)
		switch {
		case err != nil:
		case e.kind == tar.TypeDir:
			err = os.MkdirAll(name, 0o755)
		case e.kind == tar.TypeSymlink:
			err = os.Symlink(e.link, name)
		default:
			err = os.WriteFile(name, []byte(e.body), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestImportDirectory(t *testing.T) {
	from := newWorld(t)
	layout := from.layout(annotated(from.image("amd64", "one"), v1.AnnotationRefName, "docker.io/library/x:1"))
	l := newLegacy(t)
	l.image([]string{"x:1"}, "one", "two", "one") // the last layer is a link to the first
	for _, entries := range [][]entry{append(layout, entry{name: "ingest/x/data", body: "x"}), l.all()} {
		dir := unpack(t, entries)
		to := newWorld(t)
		if _, err := transfer.Import(t.Context(), to.store, to.names, transfer.Dir(dir), transfer.ImportOptions{}); err != nil {
			t.Fatal(err)
		}
		to.unpackable("docker.io/library/x:1")
		same := newWorld(t)
		same.mustLoad(archiveOf(t, entries...), transfer.ImportOptions{})
		if !slices.Equal(to.digests(), same.digests()) {
			t.Errorf("blobs %v, of the archive %v", to.digests(), same.digests())
		}
	}
	// No file outside is read.
	secret := filepath.Join(t.TempDir(), "secret.tar")
	cfg, layers := config(t, "amd64", "one")
	if err := os.WriteFile(secret, layers[0], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{secret, "../" + filepath.Base(filepath.Dir(secret)) + "/secret.tar"} {
		dir := unpack(t, []entry{{name: "c.json", body: string(cfg)}, {name: "l.tar", kind: tar.TypeSymlink, link: link},
			{name: "manifest.json", body: `[{"Config":"c.json","RepoTags":["x:1"],"Layers":["l.tar"]}]`}})
		to := newWorld(t)
		if _, err := transfer.Import(t.Context(), to.store, to.names, transfer.Dir(dir), transfer.ImportOptions{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a link outside: %v", err)
		}
		if slices.Contains(to.digests(), digest.FromBytes(layers[0])) {
			t.Error("what is outside was stored")
		}
	}
}

func TestExportWithoutAName(t *testing.T) {
	w := newWorld(t)
	a := w.image("amd64", "one")
	a.Platform = nil
	var b bytes.Buffer
	if err := transfer.Export(t.Context(), w.store, &b, []image.Image{{Target: a}, {Target: a}}, transfer.ExportOptions{Platform: only(t, "")}); err != nil {
		t.Fatal(err)
	}
	_, index, docker := contents(t, b.Bytes())
	if len(index.Manifests) != 1 || index.Manifests[0].Annotations != nil || len(docker) != 1 || len(docker[0].RepoTags) != 0 {
		t.Errorf("index %+v, docker %+v", index, docker)
	}
	equal(t, newWorld(t).mustLoad(b.Bytes(), transfer.ImportOptions{Name: "n:1"}), "n:1 "+string(a.Digest))
}

func TestExportFormats(t *testing.T) {
	w := newWorld(t)
	amd, arm := w.image("amd64", "one"), w.image("arm64", "two")
	w.name("docker.io/library/x:1", w.index(amd, arm))
	has := func(names []string, want ...string) {
		t.Helper()
		for _, name := range want {
			if !slices.Contains(names, name) {
				t.Errorf("no %s in %q", name, names)
			}
		}
	}
	names, _, docker := contents(t, w.mustSave(transfer.ExportOptions{Format: transfer.OCI}, "docker.io/library/x:1"))
	if has(names, "oci-layout", "index.json"); docker != nil || len(names) != 2+2+7 {
		t.Errorf("entries %q", names)
	}
	archive := w.mustSave(transfer.ExportOptions{Format: transfer.Docker}, "docker.io/library/x:1")
	names, _, docker = contents(t, archive)
	if has(names, "manifest.json"); len(docker) != 1 || len(names) != 1+2+2 { // a config and a layer
		t.Errorf("entries %q", names)
	}
	to := newWorld(t)
	to.mustLoad(archive, transfer.ImportOptions{})
	to.unpackable("docker.io/library/x:1")
	w.name("artifact:1", w.putJSON(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest,
		Config: w.put(v1.MediaTypeEmptyJSON, []byte("{}"), digest.SHA256), Layers: []v1.Descriptor{w.put("application/x", []byte("x"), digest.SHA256)}}))
	if b, err := w.save(transfer.ExportOptions{Format: transfer.Docker}, "artifact:1"); !errdefs.IsInvalidArgument(err) || len(b) > 0 {
		t.Errorf("an artifact for docker: %v", err)
	}
}

func TestExportDirectory(t *testing.T) {
	w := newWorld(t)
	a := w.image("amd64", "one", "two")
	w.name("docker.io/library/x:1", a)
	img, err := w.names.Get("docker.io/library/x:1")
	if err != nil {
		t.Fatal(err)
	}
	export := func(dir string, format transfer.Format) error {
		return transfer.ExportDir(t.Context(), w.store, dir, []image.Image{img}, transfer.ExportOptions{Platform: only(t, ""), Format: format})
	}
	dir := filepath.Join(t.TempDir(), "a", "layout")
	if err := export(dir, transfer.OCI); err != nil {
		t.Fatal(err)
	}
	to := newWorld(t)
	if _, err := transfer.Import(t.Context(), to.store, to.names, transfer.Dir(dir), transfer.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	equal(t, to.list(), w.list()...)
	if err := export(dir, transfer.OCI); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a layout: %v", err)
	}
	// Files that an export leaves when it is killed: some blobs, one of them incomplete, and perhaps an index.json.
	children, err := image.Walker{Store: w.store}.Children(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	blob := path("blobs/sha256/" + children[1].Digest.Encoded())
	for _, name := range []string{path("oci-layout"), blob} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path("blobs/sha256/.tmp-x"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := export(dir, transfer.OCI); err != nil {
		t.Errorf("a part: %v", err)
	}
	if _, err := os.Stat(blob); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(path("blobs/sha256/.tmp-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := os.Remove(path("oci-layout")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := export(dir, transfer.OCI); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "notes") {
		t.Errorf("another directory: %v", err)
	}
	if err := export(filepath.Join(t.TempDir(), "x"), transfer.Docker); !errdefs.IsInvalidArgument(err) {
		t.Errorf("for docker: %v", err)
	}
}
