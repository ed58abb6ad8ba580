package transfer_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// world is a store and its names.
type world struct {
	t     testing.TB
	store *content.Store
	names *image.Names
}

func newWorld(t testing.TB) *world {
	t.Helper()
	store, err := content.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	names, err := image.OpenNames(store, image.DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	return &world{t, store, names}
}

// put stores a blob under a digest of the algorithm.
func (w *world) put(mediaType string, b []byte, alg digest.Algorithm) v1.Descriptor {
	w.t.Helper()
	d := v1.Descriptor{MediaType: mediaType, Digest: alg.FromBytes(b), Size: int64(len(b))}
	if _, err := content.WriteBlob(w.t.Context(), w.store, string(d.Digest), bytes.NewReader(b), d.Size, d.Digest); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *world) putJSON(mediaType string, v any) v1.Descriptor {
	w.t.Helper()
	return w.put(mediaType, asJSON(w.t, v), digest.SHA256)
}

// image stores an image with one layer per text, for linux on the architecture.
func (w *world) image(arch string, texts ...string) v1.Descriptor {
	w.t.Helper()
	cfg, layers := config(w.t, arch, texts...)
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: w.put(v1.MediaTypeImageConfig, cfg, digest.SHA256), Layers: []v1.Descriptor{},
	}
	for _, l := range layers {
		m.Layers = append(m.Layers, w.put(v1.MediaTypeImageLayerGzip, gz(w.t, l), digest.SHA256))
	}
	d := w.putJSON(m.MediaType, m)
	d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
	return d
}

func (w *world) index(manifests ...v1.Descriptor) v1.Descriptor {
	w.t.Helper()
	return w.putJSON(v1.MediaTypeImageIndex, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: manifests,
	})
}

func (w *world) name(name string, d v1.Descriptor) image.Image {
	w.t.Helper()
	d.Platform = nil
	img, err := w.names.Create(w.t.Context(), name, d)
	if err != nil {
		w.t.Fatal(err)
	}
	return img
}

// entry gives a descriptor a name in the way another tool would, whatever the descriptor describes.
func (w *world) entry(name string, d v1.Descriptor) {
	w.t.Helper()
	d.Annotations = map[string]string{v1.AnnotationRefName: name}
	err := w.store.Change(w.t.Context(), w.store.Init, func(ix *layout.Index) error {
		e, err := layout.NewEntry(d)
		ix.Entries = append(ix.Entries, e)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// list returns the names in the store, sorted, as NAME DIGEST.
func (w *world) list() []string {
	w.t.Helper()
	images, err := w.names.List()
	if err != nil {
		w.t.Fatal(err)
	}
	var all []string
	for _, img := range images {
		all = append(all, img.Name+" "+string(img.Target.Digest))
	}
	return all
}

func (w *world) digests() []digest.Digest {
	w.t.Helper()
	var all []digest.Digest
	err := w.store.Digests(w.t.Context(), func(d digest.Digest) error {
		all = append(all, d)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func (w *world) delete(d digest.Digest) {
	w.t.Helper()
	if err := w.store.Delete(w.t.Context(), d); err != nil {
		w.t.Fatal(err)
	}
}

// clean fails the test if an ingest is left.
func (w *world) clean() {
	w.t.Helper()
	left, err := w.store.ListStatuses(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	for _, st := range left {
		w.t.Errorf("ingest %s was left behind", st.Ref)
	}
}

func asJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// config is an image config, with the tars of its layers, whose diff IDs it has.
func config(t testing.TB, arch string, texts ...string) (cfg []byte, layers [][]byte) {
	t.Helper()
	c := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: arch}, RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}}
	for _, text := range texts {
		l := archiveOf(t, entry{name: "etc/" + strings.Fields(text + " x")[0], body: text})
		layers = append(layers, l)
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(l))
	}
	return asJSON(t, c), layers
}

// entry is an entry of an archive: a file, unless it has another type or a link.
type entry struct {
	name, body, link string
	kind             byte
}

func archiveOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Typeflag: cmp.Or(e.kind, tar.TypeReg), Name: e.name, Linkname: e.link, Mode: 0o644, Size: int64(len(e.body)),
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// layout returns the entries of an OCI archive: the store's blobs, and an index.json with these entries.
func (w *world) layout(manifests ...v1.Descriptor) []entry {
	w.t.Helper()
	entries := []entry{{name: "oci-layout", body: `{"imageLayoutVersion":"1.0.0"}`}}
	for _, d := range w.digests() {
		path, err := w.store.Path(d)
		if err != nil {
			w.t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			w.t.Fatal(err)
		}
		entries = append(entries, entry{name: "blobs/" + string(d.Algorithm()) + "/" + d.Encoded(), body: string(b)})
	}
	if manifests == nil {
		manifests = []v1.Descriptor{}
	}
	ix := asJSON(w.t, v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: manifests})
	return append(entries, entry{name: "index.json", body: string(ix)})
}

func annotated(d v1.Descriptor, pairs ...string) v1.Descriptor {
	d.Annotations = map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		d.Annotations[pairs[i]] = pairs[i+1]
	}
	return d
}

// legacy returns the entries of an archive as `docker save` wrote it before it wrote OCI layouts: for each image a
// config and a directory per layer, a repeated layer as a link, and manifest.json at the end.
type legacy struct {
	t       testing.TB
	entries []entry
	images  []dockerImage
	layers  map[string]string // digest of a tar → its entry in the archive
}

type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func newLegacy(t testing.TB) *legacy { return &legacy{t: t, layers: map[string]string{}} }

func (l *legacy) image(tags []string, texts ...string) {
	l.t.Helper()
	cfg, layers := config(l.t, "amd64", texts...)
	sum := sha256.Sum256(cfg)
	img := dockerImage{Config: hex.EncodeToString(sum[:]) + ".json", RepoTags: tags}
	for i, layer := range layers {
		id := sha256.Sum256([]byte(strings.Join(texts[:i+1], "\n")))
		dir := hex.EncodeToString(id[:])
		name := dir + "/layer.tar"
		img.Layers = append(img.Layers, name)
		if slices.ContainsFunc(l.entries, func(e entry) bool { return e.name == name }) {
			continue
		}
		l.entries = append(l.entries,
			entry{name: dir + "/", kind: tar.TypeDir},
			entry{name: dir + "/VERSION", body: "1.0"},
			entry{name: dir + "/json", body: `{"id":"` + dir + `"}`})
		if first, there := l.layers[string(layer)]; there {
			l.entries = append(l.entries, entry{name: name, kind: tar.TypeSymlink, link: path.Join("..", first)})
			continue
		}
		l.layers[string(layer)] = name
		l.entries = append(l.entries, entry{name: name, body: string(layer)})
	}
	if !slices.ContainsFunc(l.entries, func(e entry) bool { return e.name == img.Config }) {
		l.entries = append(l.entries, entry{name: img.Config, body: string(cfg)})
	}
	l.images = append(l.images, img)
}

func (l *legacy) all() []entry {
	return append(slices.Clone(l.entries),
		entry{name: "manifest.json", body: string(asJSON(l.t, l.images))},
		entry{name: "repositories", body: "{}"})
}
