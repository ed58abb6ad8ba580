// Package transfer moves images between a store and archives: OCI image layouts in a tar
// (image-spec v1.1, image-layout.md) and what `docker save` writes, the old form with a
// directory a layer and the new one, which is an OCI layout too.
//
// Archives are streams in both directions: nothing is seeked, and memory does not grow with
// the size of a layer. Archives that are read are hostile: no name in them ever becomes a
// path, links lead to entries of the same archive or nowhere, and no image gets its name
// before all of it is in the store and verified.
package transfer

import (
	"context"
	"fmt"

	"distkit/content"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Selection tells how much of an index is moved. A name that points at a manifest moves that
// manifest, whatever the selection.
type Selection int

const (
	// Available is as much as can be had. Import: the index, of which one platform at least
	// must have been brought whole. Export: the index where all of it is in the store, else
	// the manifest for the platform, since many readers fail on an index with gaps.
	Available Selection = iota
	// One is the manifest for the platform, under the index's name.
	One
	// All is the index with everything it refers to.
	All
	// Sparse is the index with those manifests that are whole: for Export; Import takes it as
	// Available.
	Sparse
)

// AnnotationImageName is containerd's annotation of an image's full name, where
// org.opencontainers.image.ref.name has the tag alone.
const AnnotationImageName = "io.containerd.image.name"

const (
	dockerConfig        = "application/vnd.docker.container.image.v1+json"
	dockerLayer         = "application/vnd.docker.image.rootfs.diff.tar"
	dockerManifestsFile = "manifest.json"
)

func invalid(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

func damaged(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}

func absent(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrNotFound, format, a...)
}

// tree is what of an image the store has.
type tree struct {
	root      v1.Descriptor                   // with the media type that the blob tells; "" if it is not here
	blobs     map[digest.Digest]v1.Descriptor // of indexes, and of manifests that are whole
	gaps      []gap
	manifests []image.Node // that are whole
	images    int          // of those, as are not attached to others
}

// gap is a manifest or index that is not whole.
type gap struct {
	manifest v1.Descriptor
	config   digest.Digest // "" where the manifest itself is missing
	missing  v1.Descriptor // the first of what is missing
}

// survey finds what of an image the store has. A descriptor that lies about what its blob is, or about its size, is an
// error also where gaps are not. NotFound: the image itself isn't there.
func survey(ctx context.Context, store *content.Store, d v1.Descriptor) (*tree, error) {
	t := &tree{root: d, blobs: map[digest.Digest]v1.Descriptor{}}
	here := map[digest.Digest]bool{}
	var manifests []image.Node
	err := image.Walker{Store: store}.Walk(ctx, d, func(n image.Node) error {
		here[n.Digest] = n.Here
		isRoot := n.Digest == d.Digest && !n.Part
		// The same bytes must not be one thing to us and another to the next who reads them.
		if n.Type != "" && n.MediaType != n.Type && (image.IsIndex(n.MediaType) || image.IsManifest(n.MediaType)) {
			return invalid("%s is of type %s, its descriptor says %.80q", n.Digest, n.Type, n.MediaType)
		}
		if isRoot {
			t.root.MediaType = n.Type
		}
		switch {
		case n.Part:
		case !n.Here:
			t.gaps = append(t.gaps, gap{manifest: n.Descriptor, missing: n.Descriptor})
		case n.Type != "" && !image.IsIndex(n.Type):
			manifests = append(manifests, n)
		case n.Type == "" && isRoot:
			return invalid("%s is no manifest or index", n.Digest)
		default:
			t.blobs[n.Digest] = n.Descriptor
		}
		return nil
	})
	for _, n := range manifests {
		t.add(n, here)
	}
	return t, err
}

// add takes a manifest with its parts, or notes what it lacks.
func (t *tree) add(n image.Node, here map[digest.Digest]bool) {
	for _, c := range n.Children {
		if !here[c.Digest] && !image.IsForeign(c.MediaType) {
			t.gaps = append(t.gaps, gap{n.Descriptor, n.Children[0].Digest, c})
			return
		}
	}
	t.blobs[n.Digest] = n.Descriptor
	for _, c := range n.Children {
		if here[c.Digest] {
			t.blobs[c.Digest] = c
		}
	}
	t.manifests = append(t.manifests, n)
	if !attached(n.Descriptor) {
		t.images++
	}
}

// attached reports whether a manifest is about another one of its index: an attestation, as buildkit writes them.
// docker saves attestations in part.
func attached(d v1.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" || d.Platform != nil && d.Platform.OS == "unknown"
}

func unknownVersion(version string) error {
	return errclass.As(fmt.Errorf("image layout version %.40q is not known (only %s)", version, v1.ImageLayoutVersion), errdefs.ErrFailedPrecondition)
}
