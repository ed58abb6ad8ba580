// Package transfer moves images between a store and archives: OCI image layouts in a tar or directory (image-spec v1.1,
// image-layout.md), and the archives of `docker save`, both the old form with a directory per layer and the new one,
// which is an OCI layout too.
//
// [Import] reads a [Source] ([Stream] or [Dir]): it stores the blobs while it reads, verifies each image, and then
// names all of them in one change. [List] shows what an archive contains. [Export] writes a tar, and [ExportDir] a
// directory.
//
// Archives are streams in both directions: nothing is seeked, and memory does not grow with the size of a layer.
// Archives that are read are hostile: no name in them becomes a path, links only lead to entries of the same archive,
// and no image gets its name before everything in it is stored and verified.
//
// Errors have classes of github.com/containerd/errdefs: DataLoss (a damaged archive), InvalidArgument (not an image
// archive), NotFound (a missing blob, image or platform), NotImplemented (an unsupported compression).
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

// Selection says how much of an index to move. If a name points at a manifest, that manifest is moved.
type Selection int

const (
	// Available moves as much as there is. Import: the index, of which at least one platform must be complete. Export:
	// the index if it is completely stored, or else the platform's manifest, since many readers fail on an index with
	// gaps.
	Available Selection = iota
	// One moves the platform's manifest, under the name of the index.
	One
	// All moves the index with everything that it refers to.
	All
	// Sparse exports the index with those manifests that are complete. Import treats it as Available.
	Sparse
)

// AnnotationImageName is containerd's annotation for an image's full name. org.opencontainers.image.ref.name then has
// only the tag.
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

// tree says what the store has of an image.
type tree struct {
	root      v1.Descriptor                   // with the media type that the blob states; "" if it isn't stored
	blobs     map[digest.Digest]v1.Descriptor // indexes, and the blobs of complete manifests
	gaps      []gap
	manifests []image.Node // the complete ones
	images    int          // how many of these are not attached to others
}

// gap is a manifest or index that is not complete.
type gap struct {
	manifest v1.Descriptor
	config   digest.Digest // "" if the manifest itself is missing
	missing  v1.Descriptor // the first missing blob
}

// survey determines what the store has of an image. A descriptor with a wrong type or size is an error, even where gaps
// are allowed. NotFound: the image itself isn't stored.
func survey(ctx context.Context, store *content.Store, d v1.Descriptor) (*tree, error) {
	t := &tree{root: d, blobs: map[digest.Digest]v1.Descriptor{}}
	here := map[digest.Digest]bool{}
	var manifests []image.Node
	err := image.Walker{Store: store}.Walk(ctx, d, func(n image.Node) error {
		here[n.Digest] = n.Here
		isRoot := n.Digest == d.Digest && !n.Part
		// The same bytes must not mean different things to different readers.
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
			return invalid("%s is not a manifest or index", n.Digest)
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

// add records a manifest with its parts, or what it lacks.
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

// attached reports whether a manifest describes another one of its index: an attestation, as buildkit writes them.
// docker saves attestations incompletely.
func attached(d v1.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" || d.Platform != nil && d.Platform.OS == "unknown"
}

func unknownVersion(version string) error {
	return errclass.As(fmt.Errorf("unknown image layout version %.40q (only %s is supported)", version, v1.ImageLayoutVersion), errdefs.ErrFailedPrecondition)
}
