package image

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ociTypes maps Docker's media types to OCI's. The formats are otherwise the same.
var ociTypes = map[string]string{
	dockerManifestList: v1.MediaTypeImageIndex,
	dockerManifest:     v1.MediaTypeImageManifest,
	dockerConfig:       v1.MediaTypeImageConfig,

	"application/vnd.docker.image.rootfs.diff.tar":              v1.MediaTypeImageLayer,
	"application/vnd.docker.image.rootfs.diff.tar.gzip":         v1.MediaTypeImageLayerGzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd":         v1.MediaTypeImageLayerZstd,
	"application/vnd.docker.image.rootfs.foreign.diff.tar":      "application/vnd.oci.image.layer.nondistributable.v1.tar",
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
}

// Convert stores the OCI form of an index or manifest with Docker's media types, and returns its descriptor. Configs,
// layers and unknown members stay unchanged. A manifest of an index that isn't in the store can't be converted, so its
// descriptor stays too. A document without Docker types is returned unchanged. If a platform is set, only its manifest
// is converted.
func (w Walker) Convert(ctx context.Context, d v1.Descriptor) (v1.Descriptor, error) {
	if w.Platform != nil {
		var err error
		if d, err = w.Manifest(ctx, d); err != nil {
			return d, err
		}
		w.Platform = nil
	}
	var nodes []Node
	err := w.Walk(ctx, d, func(n Node) error {
		if !IsIndex(n.Type) {
			n.Children = nil // they may be many
		}
		if n.Type != "" {
			nodes = append(nodes, n)
		}
		return nil
	})
	if err != nil {
		return d, err
	}
	if len(nodes) == 0 {
		_, err := w.document(d) // returns the reason why it is not a document
		return d, err
	}
	c := converter{w: w, nodes: map[digest.Digest]Node{}, done: map[digest.Digest]v1.Descriptor{}}
	for _, n := range nodes {
		c.nodes[n.Digest] = n
	}
	return c.convert(ctx, nodes[0])
}

type converter struct {
	w     Walker
	nodes map[digest.Digest]Node
	done  map[digest.Digest]v1.Descriptor // the converted descriptors
}

// convert converts the documents that a document refers to, and then the document itself. Walk has bounded the depth.
func (c *converter) convert(ctx context.Context, n Node) (v1.Descriptor, error) {
	if d, ok := c.done[n.Digest]; ok {
		return d, nil
	}
	d := n.Descriptor
	d.MediaType = n.Type
	if !IsIndex(n.Type) && !IsManifest(n.Type) {
		c.done[n.Digest] = d
		return d, nil
	}
	if IsIndex(n.Type) {
		for _, child := range n.Children {
			if node, ok := c.nodes[child.Digest]; ok {
				if _, err := c.convert(ctx, node); err != nil {
					return d, err
				}
			}
		}
	}
	b, err := c.w.read(n.Descriptor)
	if err != nil {
		return d, err
	}
	if !utf8.Valid(b) { // invalid bytes can't be carried over
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "convert %s: it is not UTF-8", n.Digest)
	}
	changed := false
	b = layout.EditMembers(b, func(key string, value json.RawMessage) []byte {
		switch strings.ToLower(key) {
		case "mediatype":
			return newType(value, &changed)
		case "config":
			return c.descriptor(value, false, &changed)
		case "layers", "manifests":
			return layout.EditElements(value, func(value json.RawMessage) []byte {
				return c.descriptor(value, IsIndex(n.Type), &changed)
			})
		}
		return value
	})
	if changed {
		if oci, ok := ociTypes[n.Type]; ok {
			d.MediaType = oci
		}
		put, err := c.w.Put(ctx, d.MediaType, b)
		if err != nil {
			return d, fmt.Errorf("convert %s: %w", n.Digest, err)
		}
		d.Digest, d.Size = put.Digest, put.Size
	}
	c.done[n.Digest] = d
	return d, nil
}

// descriptor rewrites a descriptor. If its document was converted, it gets the digest, size and type of the new one.
// Otherwise at most its media type changes.
func (c *converter) descriptor(raw json.RawMessage, mayBeDocument bool, changed *bool) []byte {
	old, _ := reference(raw)
	converted, ok := c.done[old.Digest]
	ok = ok && mayBeDocument && converted.Digest != old.Digest
	if !ok {
		return layout.EditMembers(raw, func(key string, value json.RawMessage) []byte {
			if strings.EqualFold(key, "mediaType") && (!mayBeDocument || c.done[old.Digest].Digest != "") {
				return newType(value, changed)
			}
			return value
		})
	}
	*changed = true
	b := repoint(raw, converted, func() []byte {
		b, _ := c.w.read(converted) // just stored; even without its bytes the descriptor is right
		return b
	})
	if current, _ := reference(b); current.MediaType == "" {
		b = append([]byte(`{"mediaType":`+string(quote(converted.MediaType))+`,`), b[1:]...)
	}
	return b
}

// newType returns OCI's name for a Docker media type, or value unchanged.
func newType(value json.RawMessage, changed *bool) []byte {
	s, _ := shortString(value)
	if oci, ok := ociTypes[s]; ok {
		*changed = true
		return quote(oci)
	}
	return value
}

// quote quotes a media type or digest as JSON. They have nothing to escape.
func quote(s string) []byte { return []byte(`"` + s + `"`) }
