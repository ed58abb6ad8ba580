package archive

import "github.com/opencontainers/go-digest"

// ChainID returns the chain ID of the stack of layers below and, on top of it, the layer
// diffID, as the image specification's "Layer ChainID" defines it. An empty parent means
// that diffID is the lowest layer. Both must be digests (ErrInvalidArgument).
func ChainID(parent, diffID digest.Digest) (digest.Digest, error) {
	for _, d := range []digest.Digest{parent, diffID} {
		if d == "" && d == parent && d != diffID {
			continue
		}
		if err := d.Validate(); err != nil {
			return "", refused("diff ID %s: %w", quote(d.String()), err)
		}
	}
	if parent == "" {
		return diffID, nil
	}
	return digest.FromString(parent.String() + " " + diffID.String()), nil
}
