package copygraph

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ListReferrers calls f with each manifest that is said to have a subject.
type ListReferrers func(ctx context.Context, subject digest.Digest, f func(v1.Descriptor) error) error

// ReferrersOf returns the list of a namespace's index in a store. The index is read once, when the list is first asked for.
func ReferrersOf(store *content.Store, namespace string) ListReferrers {
	read := sync.OnceValues(func() (map[digest.Digest][]v1.Descriptor, error) {
		names, err := image.OpenNames(store, namespace)
		if err != nil {
			return nil, err
		}
		return names.ReferrersOf()
	})
	return func(_ context.Context, subject digest.Digest, f func(v1.Descriptor) error) error {
		all, err := read()
		if err != nil {
			return err
		}
		for _, d := range all[subject] {
			if err := f(d); err != nil {
				return err
			}
		}
		return nil
	}
}

// Referring returns the referrers that a copy has come to, in the order of the plan.
func (c *Copy) Referring() []layout.Referrer {
	var list []layout.Referrer
	for _, o := range c.objects {
		if o.as == nil {
			continue
		}
		if o.as.to != "" {
			list = append(list, layout.Referrer{Descriptor: o.descriptor(), Subject: o.as.to})
		}
		for _, tag := range o.as.tags {
			_, subject, _ := layout.ParseReferrerTag(tag)
			list = append(list, layout.Referrer{Descriptor: o.descriptor(), Subject: subject, Tag: tag})
		}
	}
	return list
}

// planReferrers plans the copy of what refers to documents of the plan, level by level, since referrers may have referrers.
// The lists are not trusted. All that they name counts towards the limits of one graph. And each referrer's own document must
// name the subject: otherwise two objects might wait for each other.
func (c *Copy) planReferrers(ctx context.Context) error {
	tally := &image.Tally{}
	for depth := 1; len(c.subjects) > 0; depth++ {
		subjects := c.subjects
		c.subjects = nil
		lists, err := c.listReferrers(ctx, tally, subjects)
		if err != nil {
			return err
		}
		var all []v1.Descriptor
		for _, subject := range subjects {
			all = append(all, lists[subject]...)
		}
		if len(all) > 0 && depth > image.MaxDepth {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "%s: referrers of referrers nest deeper than %d", all[0].Digest, image.MaxDepth)
		}
		if err := c.documents(ctx, all...); err != nil {
			return err
		}
		for _, subject := range subjects {
			for _, d := range lists[subject] {
				if err := c.planReferrer(ctx, tally, subject, d); err != nil {
					return fmt.Errorf("referrer %s of %s: %w", d.Digest, subject.digest, err)
				}
			}
		}
	}
	return nil
}

// listReferrers lists the referrers of each subject, several lists at a time.
func (c *Copy) listReferrers(ctx context.Context, tally *image.Tally, subjects []*object) (map[*object][]v1.Descriptor, error) {
	lists := map[*object][]v1.Descriptor{}
	err := c.parallel(ctx, subjects, func(ctx context.Context, o *object) error {
		err := c.Referrers(ctx, o.digest, func(d v1.Descriptor) error {
			if d.Size > image.MaxDocument {
				return errclass.Errorf(errdefs.ErrInvalidArgument, "%s: %d bytes are too many for a manifest or index", d.Digest, d.Size)
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if len(c.ArtifactTypes) == 0 || slices.Contains(c.ArtifactTypes, d.ArtifactType) {
				d.ArtifactType = ""
				lists[o] = append(lists[o], d)
			}
			return tally.Add(1, 0)
		})
		if err != nil {
			return fmt.Errorf("list referrers of %s: %w", o.digest, err)
		}
		return nil
	})
	return lists, err
}

// planReferrer plans the copy of a referrer, whose document is in Documents, after its subject. All that it refers to is copied
// too, for all platforms. A tag may attach anything to a subject, also what the subject refers to, so neither waits for the other.
func (c *Copy) planReferrer(ctx context.Context, tally *image.Tally, subject *object, d v1.Descriptor) error {
	w := image.Walker{Store: c.Documents, Tally: tally}
	of, err := w.Subject(d.Digest)
	if err != nil {
		return err
	}
	tag, by, tagged := layout.ParseReferrerTag(d.Annotations[v1.AnnotationRefName])
	tagged = tagged && by == subject.digest
	if of != subject.digest && !tagged {
		return errclass.Errorf(errdefs.ErrDataLoss, "it does not refer to that")
	}
	o := c.object(d)
	planned := o.as != nil
	if !planned {
		o.as = &referrer{}
	}
	o.wanted = true
	if tagged && !slices.Contains(o.as.tags, tag.Tag) {
		o.as.tags = append(o.as.tags, tag.Tag)
	}
	if of == subject.digest && o.as.to == "" {
		o.as.to = of
		subject.parents = append(subject.parents, o)
		o.pending++
	}
	if planned {
		return nil
	}
	return w.Walk(ctx, d, func(n image.Node) error {
		if err := c.visit(ctx, n); err != nil || c.Gate == nil || n.Type == "" || image.IsIndex(n.Type) {
			return err
		}
		// The gate may want to read what a signature is made of.
		var small []v1.Descriptor
		for _, part := range n.Children {
			if part.Size > image.MaxDocument {
				continue
			}
			if err := tally.Add(0, part.Size); err != nil {
				return err
			}
			small = append(small, part)
		}
		return c.documents(ctx, small...)
	})
}

// visit enters a node of a walk into the plan, and brings the documents that an index refers to.
func (c *Copy) visit(ctx context.Context, n image.Node) error {
	if image.IsIndex(n.Type) {
		if err := c.documents(ctx, n.Children...); err != nil {
			return err
		}
	}
	c.add(n)
	return nil
}
