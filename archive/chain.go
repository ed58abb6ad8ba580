package archive

import "github.com/opencontainers/go-digest"

// ChainID returns the chain ID of the layer diffID on top of the stack with chain ID parent, as "Layer ChainID" in the
// image specification defines it. If parent is "", diffID is the lowest layer. ErrInvalidArgument if one is not a
// digest.
func ChainID(parent, diffID digest.Digest) (digest.Digest, error) {
	for _, d := range []digest.Digest{parent, diffID} {
		if d == "" && d == parent && d != diffID {
			continue
		}
		if err := d.Validate(); err != nil {
			return "", invalid("diff ID %s: %w", quote(d.String()), err)
		}
	}
	if parent == "" {
		return diffID, nil
	}
	return digest.FromString(parent.String() + " " + diffID.String()), nil
}
