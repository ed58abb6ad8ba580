package transfer

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// finder finds listed referrers in a store.
type finder struct {
	store  *content.Store
	types  []string                          // artifact types; none means all
	sparse bool                              // leave out incomplete referrers
	lists  map[digest.Digest][]v1.Descriptor // by subject
	blobs  map[digest.Digest]int64           // possible subjects; the blobs of referrers are added
}

// find returns the referrers of all blobs, and their own referrers, sorted by digest. The lists are untrusted: each
// document must name its subject, and the limits of one graph apply to all of them together. NotFound: something is
// missing. InvalidArgument: they nest too deep, or are too many.
func (f finder) find(ctx context.Context) ([]layout.Referrer, error) {
	var found []layout.Referrer
	tally := &image.Tally{}
	type key struct {
		digest digest.Digest
		tag    string
	}
	seen := map[key]bool{}
	var subjects []digest.Digest
	for d := range f.blobs {
		subjects = append(subjects, d)
	}
	for depth := 1; len(subjects) > 0; depth++ {
		var next []digest.Digest
		for _, subject := range subjects {
			for _, d := range f.lists[subject] {
				tag := d.Annotations[v1.AnnotationRefName]
				if len(f.types) > 0 && !slices.Contains(f.types, d.ArtifactType) || seen[key{d.Digest, tag}] {
					continue
				}
				seen[key{d.Digest, tag}] = true
				if depth > image.MaxDepth {
					return nil, invalid("%s: referrers of referrers nest deeper than %d", d.Digest, image.MaxDepth)
				}
				blobs, err := f.take(ctx, tally, d, subject)
				if err != nil {
					return nil, fmt.Errorf("referrer %s of %s: %w", d.Digest, subject, err)
				}
				if blobs == nil {
					continue
				}
				found = append(found, layout.Referrer{Descriptor: d, Subject: subject, Tag: tag})
				for _, b := range blobs {
					if _, known := f.blobs[b.Digest]; !known {
						f.blobs[b.Digest] = b.Size
						next = append(next, b.Digest)
					}
				}
			}
		}
		subjects = next
	}
	slices.SortFunc(found, func(a, b layout.Referrer) int {
		return cmp.Or(cmp.Compare(a.Digest, b.Digest), cmp.Compare(a.Tag, b.Tag))
	})
	return found, nil
}

// take returns the blobs of a referrer, or nil if it is left out.
func (f finder) take(ctx context.Context, tally *image.Tally, d v1.Descriptor, subject digest.Digest) (map[digest.Digest]v1.Descriptor, error) {
	of, err := image.Walker{Store: f.store}.Subject(d.Digest)
	if err != nil {
		return nil, err
	}
	if _, by, tagged := layout.ParseReferrerTag(d.Annotations[v1.AnnotationRefName]); of != subject && (!tagged || by != subject) {
		return nil, damaged("it doesn't refer to the subject")
	}
	t, err := survey(ctx, f.store, d)
	if err != nil {
		return nil, err
	}
	size := int64(0)
	for _, m := range t.manifests {
		size += m.Size
	}
	if err := tally.Add(len(t.blobs), size); err != nil {
		return nil, err
	}
	if len(t.gaps) > 0 {
		if f.sparse {
			return nil, nil
		}
		return nil, absent("blob %s is not in the store", t.gaps[0].missing.Digest)
	}
	return t.blobs, nil
}

// setReferrers moves entries of an archive to a.referrers: those without a name whose documents have a subject, and
// those that a tag attaches to one.
func (a *archive) setReferrers(ctx context.Context, store *content.Store, all []found) ([]found, error) {
	a.referrers = map[digest.Digest][]v1.Descriptor{}
	w := image.Walker{Store: store}
	var images []found
	for _, f := range all {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		tag, by, tagged := layout.ParseReferrerTag(f.tag)
		if !tagged && (f.name != "" || f.tag != "") {
			images = append(images, f)
			continue
		}
		d, subject, err := w.Referrer(f.target.Digest)
		switch {
		case errdefs.IsNotFound(err): // the document is missing: if a tag says so, a referrer may be missing
			if !tagged {
				images = append(images, f)
			}
		case err != nil:
			return nil, err
		case tagged:
			f.target.Annotations = nil
			a.referrers[by] = append(a.referrers[by], tag.Tagged(f.target))
		case subject == "":
			images = append(images, f)
		default:
			a.referrers[subject] = append(a.referrers[subject], d)
		}
	}
	return images, nil
}

// addReferrers adds the referrers of images to the index of the names.
func (o ImportOptions) addReferrers(ctx context.Context, store *content.Store, names *image.Names, a *archive, images []image.Image) error {
	blobs := map[digest.Digest]int64{}
	for _, img := range images {
		t, err := survey(ctx, store, img.Target)
		if err != nil {
			return err
		}
		for _, d := range t.blobs {
			blobs[d.Digest] = d.Size
		}
	}
	f := finder{store: store, types: o.ArtifactTypes, lists: a.referrers, blobs: blobs}
	found, err := f.find(ctx)
	if errdefs.IsNotFound(err) {
		err = errclass.As(err, errdefs.ErrDataLoss) // missing in the archive
	}
	if err != nil {
		return err
	}
	ignored := 0
	for subject, list := range a.referrers {
		if _, taken := blobs[subject]; !taken {
			ignored += len(list)
		}
	}
	if ignored > 0 && o.Ignored != nil {
		o.Ignored(ignored)
	}
	return names.AddReferrers(ctx, found)
}
