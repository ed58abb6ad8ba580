package image

import (
	"context"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// State says how much of an image is in the store.
type State string

// The states of an image.
const (
	Whole      State = "whole"      // all blobs are stored
	Sparse     State = "sparse"     // some manifests of an index are whole, and the others are missing
	Incomplete State = "incomplete" // a config or layer of a stored manifest is missing, or all manifests of an index are
	Dangling   State = "dangling"   // the target itself is missing
	Corrupt    State = "corrupt"    // Walk fails: a document or a size is wrong
)

// State returns the state of an image, the number of missing blobs as far as they are known, and, for a corrupt image,
// the problem. It considers all manifests of an index, whatever the walker's platform. Documents are hashed, other
// blobs are not.
func (w Walker) State(ctx context.Context, d v1.Descriptor) (s State, missing int, problem, err error) {
	w.Platform = nil
	var dangling, partly bool
	leaves, absent := 0, 0 // the manifests of indexes that are stored, and the documents that are missing
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
