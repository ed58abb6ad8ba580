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

// Finder finds images as [Walker.Target] does. It reads the names once, when the first name is looked up.
type Finder struct {
	Names *Names
	read  *Listing
}

// Find returns the image for ref. For a digest it returns an image without a name and with that digest as its target,
// and looks up nothing. Errors are those of [Walker.Target].
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

// find returns the image named ref. If there is none, it returns the digest in ref: a full digest, that after an @, or
// the digest of a blob whose beginning ref is.
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

// Lookup returns the image with a name, or with another of the name's [refname.Spellings]. NotFound if there is none.
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
	if i := findSpelling(find, name); i >= 0 {
		return decode(ix.Entries[i])
	}
	return Image{}, missing(find, name)
}

// findSpelling returns the position of the entry with one of the name's spellings, or -1.
func findSpelling(find func(name string) int, name string) int {
	for _, s := range refname.Spellings(name) {
		if i := find(s); i >= 0 {
			return i
		}
	}
	return -1
}

// missing returns the error for a name that doesn't exist. If the name that docker would take it for, one of Docker Hub,
// exists, the error suggests that, and else how a name that begins with a registry can be fetched.
func missing(find func(name string) int, name string) error {
	for _, s := range refname.Spellings("docker.io/" + name) {
		if find(s) >= 0 {
			return errclass.Errorf(errdefs.ErrNotFound, "image %s: not found; there is %s", name, s)
		}
	}
	if host, rest, ok := strings.Cut(name, "/"); ok && strings.ContainsAny(host, ".:") {
		for _, s := range refname.Spellings(rest) {
			if _, _, ok := refname.Split(s); ok {
				return errclass.Errorf(errdefs.ErrNotFound, "image %s: not found; dist-pull %[1]s fetches it", name)
			}
		}
	}
	return fmt.Errorf("image %s: %w", name, errdefs.ErrNotFound)
}
