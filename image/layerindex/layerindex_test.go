package layerindex

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"distkit/content"
	"distkit/image"
	"distkit/layer/index"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Each layer of an image has one index, which opens as that of the layer. A manifest lists them.
func TestMake(t *testing.T) {
	t.Parallel()
	s, err := content.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	names, err := image.OpenNames(s, "default")
	if err != nil {
		t.Fatal(err)
	}
	w := image.Walker{Store: s}
	put := func(mediaType string, b []byte) v1.Descriptor {
		t.Helper()
		d, err := w.Put(t.Context(), mediaType, b)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	document := func(mediaType string, v any) v1.Descriptor {
		t.Helper()
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return put(mediaType, b)
	}
	var b bytes.Buffer
	archive := tar.NewWriter(&b)
	for range 2000 {
		if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "d/"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	layer := put(v1.MediaTypeImageLayer, b.Bytes())
	config := document(v1.MediaTypeImageConfig, v1.Image{RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest, layer.Digest}}})
	img := document(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config, Layers: []v1.Descriptor{layer, layer}})

	// An index that is not stored does not leave its reader behind: the race detector tells.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := add(ctx, s, image.Layer{Descriptor: layer, DiffID: layer.Digest}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}

	made, err := Make(t.Context(), w, names, img)
	if err != nil {
		t.Fatal(err)
	}
	path, err := s.Path(made.Digest)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	found, err := Parse(manifest)
	if err != nil || len(found) != 1 {
		t.Fatalf("%d indexes: %v", len(found), err)
	}
	f, err := s.File(found[layer.Digest].Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	x, err := index.Open(f, found[layer.Digest].Size)
	if err != nil {
		t.Fatal(err)
	}
	if d, n := x.Layer(); d != layer.Digest || n != layer.Size {
		t.Errorf("of %s, %d bytes", d, n)
	}
}
