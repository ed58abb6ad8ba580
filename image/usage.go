package image

import (
	"cmp"
	"context"
	"slices"

	"distkit/content"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Usage is the space that an image takes in the store, without alternates.
type Usage struct {
	Name      string        `json:"name,omitempty"` // "" for an entry without a name
	Target    digest.Digest `json:"target"`
	Size      int64         `json:"size"`      // of its stored blobs, for all platforms, in bytes
	Shared    int64         `json:"shared"`    // of those that another name, a container or a label needs too
	Exclusive int64         `json:"exclusive"` // of the others: a sweep deletes them after the name is deleted
}

// Usage returns the usage of each image of the namespace, sorted by name. An image uses what a [Sweep] keeps for it. A
// blob counts as shared if a name of any namespace needs it.
func (n *Names) Usage(ctx context.Context) ([]Usage, error) {
	blobs := map[[16]byte]blobUse{}
	err := n.store.WalkSizes(ctx, func(info content.Info) error {
		blobs[keyOf(info.Digest)] = blobUse{size: info.Size}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var all []Usage
	targets := map[digest.Digest]*targetUse{}
	sweeper := newSweeper(Sweep{Store: n.store})
	err = sweeper.roots(ctx, func(r root) error {
		if r.Reason.Reason == reasonImage && r.Namespace == n.namespace {
			all = append(all, Usage{Name: r.Name, Target: r.Target})
		}
		t, known := targets[r.Target]
		if !known {
			t = &targetUse{}
			targets[r.Target] = t
			marked := newSweeper(sweeper.Sweep)
			marked.dependents = sweeper.dependents
			if err := marked.reach(ctx, v1.Descriptor{Digest: r.Target}, false, r.what); err != nil {
				return err
			}
			for key := range marked.marked {
				t.take(blobs, key)
			}
		}
		t.roots++
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range all {
		u, t := &all[i], targets[all[i].Target]
		u.Size = t.size
		if t.roots == 1 {
			u.Exclusive = t.exclusive
		}
		u.Shared = u.Size - u.Exclusive
	}
	slices.SortStableFunc(all, func(a, b Usage) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// blobUse is the size of a blob, and the first target that needs it.
type blobUse struct {
	size  int64
	first *targetUse
}

// targetUse has the totals of a target, for all roots that point at it.
type targetUse struct {
	roots           int
	size, exclusive int64
}

// take adds a blob, if it is stored. It is exclusive to the first target that takes it, until another target does.
func (t *targetUse) take(blobs map[[16]byte]blobUse, key [16]byte) {
	b, here := blobs[key]
	if !here {
		return
	}
	t.size += b.size
	switch b.first {
	case nil:
		t.exclusive += b.size
		blobs[key] = blobUse{b.size, t}
	case &manyTargets:
	default:
		b.first.exclusive -= b.size
		blobs[key] = blobUse{b.size, &manyTargets}
	}
}

// manyTargets stands for more than one target.
var manyTargets targetUse
