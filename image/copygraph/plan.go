package copygraph

import (
	"context"
	"strings"

	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// plan walks the graph of a root, once for each platform, and fetches its documents into Documents.
func (c *Copy) plan(ctx context.Context, root v1.Descriptor) error {
	o := c.object(root)
	o.wanted = true
	c.roots[o] = ""
	if err := c.documents(ctx, root); err != nil {
		return err
	}
	if root.Size < 0 {
		switch size, err := c.Documents.Size(root.Digest); {
		case err == nil:
			root.Size = size
			if o.size < 0 {
				o.size = size
				c.totals.Bytes += size
			}
		case !errdefs.IsNotFound(err):
			return err
		}
	}
	platforms := c.Platforms
	if len(platforms) == 0 {
		platforms = []*image.Platform{nil}
	}
	for _, p := range platforms {
		w := image.Walker{Store: c.Documents, Platform: p}
		err := w.Walk(ctx, root, func(n image.Node) error {
			if err := c.visit(ctx, n); err != nil {
				return err
			}
			if p == nil || n.Platform != nil || !image.IsManifest(n.Type) {
				return nil
			}
			// No index states the manifest's platform, so its config decides.
			return c.checkPlatform(ctx, w, root, n.Children[0])
		})
		if err != nil {
			return c.blame(err)
		}
	}
	return nil
}

// blame gives the error of a graph its class. If the graph comes from a source, an InvalidArgument isn't the fault of
// the user's arguments, and becomes DataLoss.
func (c *Copy) blame(err error) error {
	if c.From != nil && errdefs.IsInvalidArgument(err) {
		return errclass.As(err, errdefs.ErrDataLoss)
	}
	return err
}

// checkPlatform checks that the manifest with a config matches the walker's platform, as soon as the config is in
// Documents.
func (c *Copy) checkPlatform(ctx context.Context, w image.Walker, root, config v1.Descriptor) error {
	check := func() error {
		_, err := w.Manifest(ctx, root)
		return err
	}
	switch _, err := c.Documents.Size(config.Digest); {
	case err == nil:
		return check()
	case !errdefs.IsNotFound(err):
		return err
	case c.From == nil:
		return nil
	case c.intoDocuments():
		c.object(config).check = check
		return nil
	}
	if err := c.documents(ctx, config); err != nil {
		return err
	}
	return check()
}

// documents fetches documents into Documents unless they are there: roots, and what an index refers to. A blob too
// large for a document is left to be moved like any other object.
func (c *Copy) documents(ctx context.Context, list ...v1.Descriptor) error {
	if c.From == nil {
		return nil
	}
	var absent []*object
	size := int64(0)
	seen := make(map[digest.Digest]bool, len(list)) // an index may list a manifest twice
	for _, d := range list {
		if o := c.index[d.Digest]; seen[d.Digest] || o != nil && (o.stored || o.landed) {
			continue
		}
		seen[d.Digest] = true
		_, err := c.Documents.Size(d.Digest)
		if err == nil {
			continue
		} else if !errdefs.IsNotFound(err) {
			return err
		}
		if d.Size > image.MaxDocument {
			if image.IsIndex(d.MediaType) || image.IsManifest(d.MediaType) {
				return errclass.Errorf(errdefs.ErrInvalidArgument, "%s: %d bytes are too much for a manifest or index", d.Digest, d.Size)
			}
			continue
		}
		if size += max(d.Size, 0); size > image.MaxDocuments {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "%s and its siblings have more than %d bytes", d.Digest, image.MaxDocuments)
		}
		absent = append(absent, c.object(d))
	}
	return c.parallel(ctx, absent, func(ctx context.Context, o *object) error {
		if c.intoDocuments() {
			return c.put(ctx, o)
		}
		_, err := c.store(ctx, IntoStore(c.Documents), o)
		return err
	})
}

// object returns the node of a descriptor, which it creates if need be.
func (c *Copy) object(d v1.Descriptor) *object {
	if o := c.index[d.Digest]; o != nil {
		return o
	}
	mediaType, ok := c.types[d.MediaType]
	if !ok {
		mediaType = strings.Clone(d.MediaType)
		c.types[mediaType] = mediaType
	}
	o := &object{digest: d.Digest, size: d.Size, mediaType: mediaType}
	c.index[d.Digest] = o
	c.objects = append(c.objects, o)
	c.expect(o)
	return o
}

// add enters a node of the walk and its children into the plan.
func (c *Copy) add(n image.Node) {
	o := c.object(n.Descriptor)
	o.stored = n.Here
	if image.IsIndex(n.Type) || image.IsManifest(n.Type) {
		o.mediaType = n.Type // the descriptor's type may be missing or wrong
	}
	if c.Referrers != nil && n.Type != "" && !o.subject {
		o.subject = true
		c.subjects = append(c.subjects, o)
	}
	for _, d := range n.Children {
		child := c.object(d)
		// A digest that is a foreign layer in one place and something else in another is copied.
		child.wanted = child.wanted || image.IsIndex(n.Type) || !image.IsForeign(d.MediaType)
		// A duplicate edge counts twice in both directions.
		child.parents = append(child.parents, o)
		o.pending++
	}
}
