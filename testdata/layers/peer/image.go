// Package peer is what the comparisons with other projects' unpackers share.
package peer

import (
	"compress/gzip"
	_ "crypto/sha256" // for go-digest
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image makes the OCI layout dir with the image "layer" of these layers, the files of which it
// leads to by symbolic links. They are compressed with gzip.
func Image(dir string, layers ...string) error {
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	config := v1.Image{Platform: v1.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: v1.RootFS{Type: "layers"}}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for _, l := range layers {
		d, diffID, err := describe(l)
		if err != nil {
			return fmt.Errorf("%s: %w", l, err)
		}
		if err := os.Symlink(l, filepath.Join(blobs, d.Digest.Encoded())); err != nil && !os.IsExist(err) {
			return err
		}
		manifest.Layers = append(manifest.Layers, d)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	}
	var err error
	if manifest.Config, err = put(blobs, v1.MediaTypeImageConfig, config); err != nil {
		return err
	}
	d, err := put(blobs, v1.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	d.Annotations = map[string]string{v1.AnnotationRefName: "layer"}
	index, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []v1.Descriptor{d}})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

// describe returns the layer's descriptor and diff ID.
func describe(layer string) (v1.Descriptor, digest.Digest, error) {
	d := v1.Descriptor{MediaType: v1.MediaTypeImageLayerGzip}
	f, err := os.Open(layer)
	if err != nil {
		return d, "", err
	}
	defer f.Close()
	blob, diffID := digest.Canonical.Digester(), digest.Canonical.Digester()
	z, err := gzip.NewReader(io.TeeReader(f, blob.Hash()))
	if err != nil {
		return d, "", err
	}
	if _, err := io.Copy(diffID.Hash(), z); err != nil {
		return d, "", err
	}
	if _, err := io.Copy(blob.Hash(), f); err != nil {
		return d, "", err
	}
	d.Digest = blob.Digest()
	d.Size, err = f.Seek(0, io.SeekCurrent)
	return d, diffID.Digest(), err
}

func put(blobs, mediaType string, v any) (v1.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return d, os.WriteFile(filepath.Join(blobs, d.Digest.Encoded()), b, 0o644)
}
