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
	"strings"

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

// maxDepth bounds how deep indexes nest.
const maxDepth = 4

// foreign are layers that are fetched from elsewhere and that archives leave out.
func foreign(mediaType string) bool {
	return strings.Contains(mediaType, ".nondistributable.") || strings.Contains(mediaType, ".foreign.")
}

func invalid(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

func damaged(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}

func absent(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrNotFound, format, a...)
}

// tree finds what of an image the store has. Its zero value but for the walker is ready.
type tree struct {
	walker image.Walker
	seen   map[digest.Digest]bool          // whether what was visited is whole
	blobs  map[digest.Digest]v1.Descriptor // of indexes, and of manifests that are whole
	gaps   []gap
	whole  int // manifests that are whole
}

// gap is a manifest or index that is not whole.
type gap struct {
	manifest v1.Descriptor
	config   digest.Digest // "" where the manifest itself is missing
	missing  v1.Descriptor // the first of what is missing
}

func newTree(store *content.Store) *tree {
	return &tree{
		walker: image.Walker{Store: store},
		seen:   map[digest.Digest]bool{},
		blobs:  map[digest.Digest]v1.Descriptor{},
	}
}

// here tells whether a blob is in the store. DataLoss if its size is not the descriptor's.
func (t *tree) here(ctx context.Context, d v1.Descriptor) (bool, error) {
	info, err := t.walker.Store.Info(ctx, d.Digest)
	if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if info.Size != d.Size {
		return false, damaged("%s has %d bytes, its descriptor says %d", d.Digest, info.Size, d.Size)
	}
	return true, nil
}

// add visits an index or a manifest and tells whether it is whole. A descriptor that lies
// about what its blob is, or about its size, is an error also where gaps are not.
func (t *tree) add(ctx context.Context, d v1.Descriptor) (bool, error) { return t.visit(ctx, d, 0) }

func (t *tree) visit(ctx context.Context, d v1.Descriptor, depth int) (bool, error) {
	if whole, seen := t.seen[d.Digest]; seen {
		return whole, nil
	}
	if depth > maxDepth {
		return false, invalid("indexes nest deeper than %d", maxDepth)
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	t.seen[d.Digest] = false
	if here, err := t.here(ctx, d); err != nil || !here {
		t.gaps = append(t.gaps, gap{manifest: d, missing: d})
		return false, err
	}
	is, err := t.walker.Describe(ctx, d.Digest)
	if err != nil {
		return false, err
	}
	if !image.IsIndex(is.MediaType) && !image.IsManifest(is.MediaType) {
		return false, invalid("%s is no manifest or index", d.Digest)
	}
	// The same bytes must not be one thing to us and another to the next who reads them.
	if d.MediaType != "" && d.MediaType != is.MediaType {
		return false, invalid("%s is of type %s, its descriptor says %.80q", d.Digest, is.MediaType, d.MediaType)
	}
	children, err := t.walker.Children(ctx, d)
	if err != nil {
		return false, err
	}
	whole := true
	if image.IsIndex(is.MediaType) {
		t.blobs[d.Digest] = d
		for _, c := range children {
			ok, err := t.child(ctx, c, depth)
			if err != nil {
				return false, err
			}
			whole = whole && ok
		}
	} else if whole, err = t.manifest(ctx, d, children); err != nil {
		return false, err
	}
	t.seen[d.Digest] = whole
	return whole, nil
}

// child visits an entry of an index, which may be of any type, and a manifest whatever type the entry tells: Children says
// what it is. One of an unknown algorithm is missing everywhere.
func (t *tree) child(ctx context.Context, d v1.Descriptor, depth int) (bool, error) {
	if image.IsIndex(d.MediaType) || image.IsManifest(d.MediaType) {
		return t.visit(ctx, d, depth+1)
	}
	here, err := t.here(ctx, d)
	if here {
		t.blobs[d.Digest] = d
	} else if err == nil {
		t.gaps = append(t.gaps, gap{manifest: d, missing: d})
	}
	return here, err
}

// manifest adds a manifest's blobs if all are there.
func (t *tree) manifest(ctx context.Context, d v1.Descriptor, children []v1.Descriptor) (bool, error) {
	have := []v1.Descriptor{d}
	for _, c := range children {
		here, err := t.here(ctx, c)
		if err != nil {
			return false, err
		}
		switch {
		case here:
			have = append(have, c)
		case foreign(c.MediaType):
		default:
			t.gaps = append(t.gaps, gap{d, children[0].Digest, c})
			return false, nil
		}
	}
	for _, h := range have {
		t.blobs[h.Digest] = h
	}
	t.whole++
	return true, nil
}

func unknownVersion(version string) error {
	return errclass.As(fmt.Errorf("image layout version %.40q is not known (only %s)", version, v1.ImageLayoutVersion), errdefs.ErrFailedPrecondition)
}
