package image

import (
	"context"
	"errors"
	"fmt"

	"distkit/content"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Containing matches images that have a certain blob. A nil Containing matches all images.
type Containing struct {
	store  *content.Store
	blob   digest.Digest
	before map[digest.Digest]bool // results for the targets so far
}

// NewContaining returns a Containing for a blob. The blob need not be in the store.
func NewContaining(store *content.Store, blob digest.Digest) *Containing {
	return &Containing{store, blob, map[digest.Digest]bool{}}
}

// errFound ends a walk.
var errFound = errors.New("found")

// Match reports whether target is the blob or refers to it, on any platform. Errors are those of [Walker.Walk].
func (c *Containing) Match(ctx context.Context, target v1.Descriptor) (bool, error) {
	if c == nil {
		return true, nil
	}
	if found, known := c.before[target.Digest]; known {
		return found, nil
	}
	err := Walker{Store: c.store}.Walk(ctx, target, func(n Node) error {
		if n.Digest == c.blob {
			return errFound
		}
		return nil
	})
	found := errors.Is(err, errFound)
	if err != nil && !found {
		return false, fmt.Errorf("look for %s in %s: %w", c.blob, target.Digest, err)
	}
	c.before[target.Digest] = found
	return found, nil
}
