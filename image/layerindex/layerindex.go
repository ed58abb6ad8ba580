// Package layerindex creates the indexes of an image's layers, and finds them. A manifest whose subject is the image's
// manifest lists them, both in a store and at a registry. [Make] creates indexes in a store; [Parse] reads the manifest
// that lists them.
package layerindex

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/image"
	"distkit/layer/index"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// AnnotationLayer is the annotation of an index's descriptor with the digest of the layer.
const AnnotationLayer = "distkit.layer"

// Make creates the indexes for the layers of the platform's manifest, which must be in the store, and stores them with
// a manifest that lists them. Sweeps keep all of this as long as the image. It returns the descriptor of the new
// manifest. Errors are those of [image.Walker.Layers] and [index.Builder].
func Make(ctx context.Context, w image.Walker, names *image.Names, d v1.Descriptor) (v1.Descriptor, error) {
	c, err := w.Contents(ctx, d)
	if err != nil {
		return v1.Descriptor{}, err
	}
	subject := v1.Descriptor{MediaType: c.Manifest.MediaType, Digest: c.Manifest.Digest, Size: c.Manifest.Size}
	manifest := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: index.MediaType,
		Config: v1.DescriptorEmptyJSON, Layers: []v1.Descriptor{}, Subject: &subject,
	}
	done := map[digest.Digest]bool{}
	for _, l := range c.Layers {
		if done[l.Digest] {
			continue
		}
		done[l.Digest] = true
		x, err := add(ctx, w.Store, l)
		if err != nil {
			return v1.Descriptor{}, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		manifest.Layers = append(manifest.Layers, x)
	}
	if _, err := w.Put(ctx, v1.MediaTypeEmptyJSON, manifest.Config.Data); err != nil {
		return v1.Descriptor{}, err
	}
	manifest.Config.Data = nil
	b, err := json.Marshal(manifest)
	if err != nil {
		return v1.Descriptor{}, err
	}
	made, err := w.Put(ctx, manifest.MediaType, b)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return made, names.AddReferrers(ctx, []layout.Referrer{{Descriptor: made, Subject: subject.Digest}})
}

// add creates and stores the index of a layer.
func add(ctx context.Context, s *content.Store, l image.Layer) (v1.Descriptor, error) {
	f, err := s.File(l.Digest)
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer f.Close()
	// The blob may be corrupt. The diff ID verifies its content but not its compressed form, so the digest is verified
	// too.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b, err := index.NewBuilder(ctx, f, "", "")
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer b.Close()
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := b.End(l.DiffID)
		if err == nil && l.Digest.Algorithm() == digest.SHA256 {
			if got, _ := b.Layer(); got != l.Digest {
				err = errclass.Errorf(errdefs.ErrDataLoss, "digest mismatch: got %s", got)
			}
		}
		if err == nil {
			err = b.Write(w)
		}
		_ = w.CloseWithError(err)
	}()
	defer func() { // not before the goroutine has finished with the builder
		cancel()
		_ = r.Close()
		<-done
	}()
	dgst, err := content.WriteBlob(ctx, s, "index:"+string(l.Digest), r, -1, "")
	if err != nil {
		return v1.Descriptor{}, err
	}
	size, err := s.Size(dgst)
	return v1.Descriptor{MediaType: index.MediaType, Digest: dgst, Size: size, Annotations: map[string]string{AnnotationLayer: string(l.Digest)}}, err
}

// Parse returns the descriptors of the indexes listed in a manifest, by the digests of their layers. InvalidArgument if
// it isn't such a manifest.
func Parse(manifest []byte) (map[digest.Digest]v1.Descriptor, error) {
	var m struct {
		ArtifactType string            `json:"artifactType"`
		Layers       image.Descriptors `json:"layers"`
	}
	if err := image.Decode(manifest, &m); err != nil {
		return nil, err
	}
	if m.ArtifactType != index.MediaType {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "a manifest of type %.80q doesn't list indexes of layers", cmp.Or(m.ArtifactType, "image"))
	}
	found := map[digest.Digest]v1.Descriptor{}
	for _, d := range m.Layers {
		if l := digest.Digest(d.Annotations[AnnotationLayer]); d.MediaType == index.MediaType && l.Validate() == nil {
			found[l] = d
		}
	}
	return found, nil
}
