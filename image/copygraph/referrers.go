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

// ListReferrers calls f with each manifest that is listed as a referrer of a subject.
type ListReferrers func(ctx context.Context, subject digest.Digest, f func(v1.Descriptor) error) error

// ReferrersOf returns the list of referrers of a namespace in a store. It reads the index once, at the first call.
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

// Referring returns the referrers that were copied, in the order of the plan.
func (c *Copy) Referring() []layout.Referrer {
	var list []layout.Referrer
	for _, o := range c.objects {
		if o.referrer == nil {
			continue
		}
		if o.referrer.to != "" {
			list = append(list, layout.Referrer{Descriptor: o.descriptor(), Subject: o.referrer.to})
		}
		for _, tag := range o.referrer.tags {
			_, subject, _ := layout.ParseReferrerTag(tag)
			list = append(list, layout.Referrer{Descriptor: o.descriptor(), Subject: subject, Tag: tag})
		}
	}
	return list
}

// planReferrers plans the copies of the referrers of planned documents, level by level, since referrers may have
// referrers. The lists are untrusted: everything on them counts towards the limits of one graph, and each referrer's
// own document must name the subject, since otherwise two objects could wait for each other.
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
				return errclass.Errorf(errdefs.ErrInvalidArgument, "%s: %d bytes are too much for a manifest or index", d.Digest, d.Size)
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

// planReferrer plans the copy of a referrer, whose document is in Documents, after its subject. Everything that it
// refers to is copied too, for all platforms. A tag may attach anything to a subject, even something that the subject
// refers to; so an object attached by a tag doesn't wait for the subject.
func (c *Copy) planReferrer(ctx context.Context, tally *image.Tally, subject *object, d v1.Descriptor) error {
	w := image.Walker{Store: c.Documents, Tally: tally}
	named, err := w.Subject(d.Digest)
	if err != nil {
		return err
	}
	tag, tagSubject, tagged := layout.ParseReferrerTag(d.Annotations[v1.AnnotationRefName])
	tagged = tagged && tagSubject == subject.digest
	if named != subject.digest && !tagged {
		return errclass.Errorf(errdefs.ErrDataLoss, "it doesn't refer to the subject")
	}
	o := c.object(d)
	planned := o.referrer != nil
	if !planned {
		o.referrer = &referrer{}
	}
	o.wanted = true
	if tagged && !slices.Contains(o.referrer.tags, tag.Tag) {
		o.referrer.tags = append(o.referrer.tags, tag.Tag)
	}
	if named == subject.digest && o.referrer.to == "" {
		o.referrer.to = named
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
		// The gate may have to read the parts of a signature.
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

// visit enters a node of a walk into the plan, and fetches the documents that an index refers to.
func (c *Copy) visit(ctx context.Context, n image.Node) error {
	if image.IsIndex(n.Type) {
		if err := c.documents(ctx, n.Children...); err != nil {
			return err
		}
	}
	c.add(n)
	return nil
}
