package image

import (
	"context"
	"fmt"
	"strings"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Finder finds images by what users call them, as [Walker.Target] does. The names are read once, when the first is looked up.
type Finder struct {
	Names *Names
	read  *Listing
}

// Find returns the image that ref stands for. For a digest it is an image without a name whose target has that digest, and nothing
// is looked up. Errors are those of [Walker.Target].
func (f *Finder) Find(ctx context.Context, ref string) (Image, error) {
	img, dgst, err := f.Names.find(ctx, ref, func(name string) (Image, error) {
		if f.read == nil {
			var err error
			if f.read, err = f.Names.Read(); err != nil {
				return Image{}, err
			}
		}
		return f.read.Lookup(name)
	})
	if dgst != "" {
		img.Target = v1.Descriptor{Digest: dgst}
	}
	return img, err
}

// find returns the image that ref names, or else the digest that it stands for: a whole digest, one behind an @, or the beginning of
// a blob's digest.
func (n *Names) find(ctx context.Context, ref string, lookup func(name string) (Image, error)) (Image, digest.Digest, error) {
	malformed := content.Validate(digest.Digest(ref))
	if malformed == nil {
		return Image{}, digest.Digest(ref), nil
	}
	img, err := lookup(ref)
	if !errdefs.IsNotFound(err) {
		return img, "", err
	}
	if dgst := digest.Digest(ref[strings.LastIndexByte(ref, '@')+1:]); content.Validate(dgst) == nil {
		return Image{}, dgst, nil
	}
	if content.IsAbbreviation(ref) {
		dgst, serr := n.store.Complete(ctx, ref)
		if !errdefs.IsNotFound(serr) {
			return Image{}, dgst, serr
		}
	} else if algorithm, _, _ := strings.Cut(ref, ":"); digest.Algorithm(algorithm).Available() {
		err = malformed
	}
	return Image{}, "", err
}

// Lookup returns the image that a user calls name: by that name, or by another of its [refname.Spellings]. NotFound when there is none.
func (n *Names) Lookup(name string) (Image, error) {
	ix, err := n.read()
	if err != nil {
		return Image{}, err
	}
	return lookup(ix, ix.Find, name)
}

// Lookup is [Names.Lookup].
func (l *Listing) Lookup(name string) (Image, error) {
	return lookup(l.index, l.find(), name)
}

func lookup(ix *layout.Index, find func(name string) int, name string) (Image, error) {
	if at := spelled(find, name); at >= 0 {
		return decode(ix.Entries[at])
	}
	return Image{}, missing(find, name)
}

// spelled returns where the entry is that a user calls name, or -1.
func spelled(find func(name string) int, name string) int {
	for _, s := range refname.Spellings(name) {
		if at := find(s); at >= 0 {
			return at
		}
	}
	return -1
}

// missing is the error of a name that is not there. It suggests the name of docker's registry that docker would take it for, if that is
// there.
func missing(find func(name string) int, name string) error {
	for _, s := range refname.Spellings("docker.io/" + name) {
		if find(s) >= 0 {
			return errclass.Errorf(errdefs.ErrNotFound, "image %s: not found; there is %s", name, s)
		}
	}
	return fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
}
