package image

import (
	"context"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// State is how much of an image is in the store.
type State string

// The states of an image.
const (
	Whole      State = "whole"      // all blobs are here
	Sparse     State = "sparse"     // of an index some manifests are whole, and the others aren't here
	Incomplete State = "incomplete" // a config or layer of a manifest that is here is missing, or all manifests of an index
	Dangling   State = "dangling"   // the blob that the descriptor means is missing itself
	Corrupt    State = "corrupt"    // Walk fails: a document or a size is wrong
)

// State returns the state of an image, how many blobs are missing, as far as can be known, and of a corrupt image what is wrong
// with it. All manifests of an index count, whatever the walker's platform. Documents are hashed, other blobs aren't.
func (w Walker) State(ctx context.Context, d v1.Descriptor) (s State, missing int, problem, err error) {
	w.Platform = nil
	var dangling, partly bool
	leaves, absent := 0, 0 // what indexes refer to: manifests that are here, and documents that aren't
	err = w.Walk(ctx, d, func(n Node) error {
		if !n.Here {
			missing++
		}
		switch {
		case n.Part:
			partly = partly || !n.Here
		case !n.Here && n.Digest == d.Digest:
			dangling = true
		case !n.Here:
			absent++
		case !IsIndex(n.Type):
			leaves++
		}
		return nil
	})
	switch {
	case errdefs.IsDataLoss(err), errdefs.IsInvalidArgument(err):
		return Corrupt, missing, err, nil
	case err != nil:
		return "", 0, nil, err
	case dangling:
		return Dangling, missing, nil, nil
	case partly, absent > 0 && leaves == 0:
		return Incomplete, missing, nil, nil
	case absent > 0:
		return Sparse, missing, nil, nil
	}
	return Whole, 0, nil, nil
}
