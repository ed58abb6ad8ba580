package image

import (
	"context"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// adopt stores the documents that a descriptor reaches and that only an alternate has: manifests, indexes and configs. Layers
// stay where they are. So a sweep finds what a name reaches, and the chains of its layers, also when it isn't told of the alternates.
func adopt(ctx context.Context, store *content.Store, d v1.Descriptor) error {
	if len(store.Alternates) == 0 {
		return nil
	}
	own := *store
	own.Alternates = nil
	return walk(ctx, d, map[digest.Digest]bool{}, func(d v1.Descriptor, _ int) ([]v1.Descriptor, error) {
		b, err := Walker{Store: store}.blob(d.Digest)
		switch {
		case errdefs.IsNotFound(err), errdefs.IsInvalidArgument(err), errdefs.IsNotImplemented(err):
			return nil, nil
		case err != nil || b == nil:
			return nil, err
		}
		if err := putDocument(ctx, &own, d.Digest, b); err != nil {
			return nil, err
		}
		var children []v1.Descriptor
		references(b, func(_ string, d v1.Descriptor) { children, _ = appendStored(children, store, d) })
		return children, nil
	})
}
