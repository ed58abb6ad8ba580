package image

import (
	"strings"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Finder turns what a user names, by a name of one namespace or by a digest, into images. The names are read once,
// when the first is asked for.
type Finder struct {
	Names *Names
	read  *Listing
}

// Find returns the image of a name. For a digest, it is one without a name whose target has that digest, and nothing else
// is looked up. NotFound if there is no such name; InvalidArgument or NotImplemented if what is none begins with the
// algorithm of a digest.
func (f *Finder) Find(object string) (Image, error) {
	dgst := digest.Digest(object)
	malformed := content.Validate(dgst)
	if malformed == nil {
		return Image{Target: v1.Descriptor{Digest: dgst}}, nil
	}
	if f.read == nil {
		var err error
		if f.read, err = f.Names.Read(); err != nil {
			return Image{}, err
		}
	}
	img, err := f.read.Get(object)
	algorithm, _, _ := strings.Cut(object, ":")
	if errdefs.IsNotFound(err) && digest.Algorithm(algorithm).Available() {
		err = malformed
	}
	return img, err
}
