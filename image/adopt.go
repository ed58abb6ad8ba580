package image

import (
	"context"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// adopt copies the documents that a descriptor reaches from alternates into the store: manifests, indexes and configs.
// Layers stay in the alternates. So a later sweep finds everything that a name reaches, and the chains of its layers,
// even without the alternates.
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
