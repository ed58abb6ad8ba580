package transfer_test

import (
	"bytes"
	"path/filepath"
	"testing"

	"distkit/content"
	"distkit/image"
	"distkit/image/transfer"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzImport checks that after an error nothing has a name, and that whatever has a name has its blobs, with the
// correct digests.
func FuzzImport(f *testing.F) {
	w := newWorld(f)
	layout := archiveOf(f, w.layout(annotated(w.image("amd64", "one"), v1.AnnotationRefName, "x:1"))...)
	l := newLegacy(f)
	l.image([]string{"y:1"}, "one", "two", "one")
	for _, b := range [][]byte{layout, gz(f, layout), zst(f, layout), archiveOf(f, l.all()...)} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, archive []byte) {
		store, err := content.Open(filepath.Join(t.TempDir(), "store"))
		if err != nil {
			t.Fatal(err)
		}
		names, err := image.OpenNames(store, image.DefaultNamespace)
		if err != nil {
			t.Fatal(err)
		}
		_, failed := transfer.Import(t.Context(), store, names, transfer.Stream(bytes.NewReader(archive)), transfer.ImportOptions{BaseName: "base"})
		images, err := names.List()
		if err != nil {
			t.Fatal(err)
		}
		if failed != nil && len(images) > 0 {
			t.Errorf("%v, and named are %v", failed, images)
		}
		for _, img := range images {
			if _, err := store.Info(t.Context(), img.Target.Digest); err != nil {
				t.Errorf("%s: %v", img.Name, err)
			}
		}
		err = store.Digests(t.Context(), func(d digest.Digest) error {
			file, err := store.File(d)
			if err != nil {
				return err
			}
			defer file.Close()
			if got, err := d.Algorithm().FromReader(file); err != nil || got != d {
				t.Errorf("%s hashes to %s: %v", d, got, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}
