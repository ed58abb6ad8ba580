package image

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// keepTag returns the annotation with a referrer tag, or nil if tag isn't one.
func keepTag(tag string) map[string]string {
	if _, _, ok := layout.ParseReferrerTag(tag); !ok {
		return nil
	}
	return map[string]string{v1.AnnotationRefName: tag}
}

// ParseReferrer decodes a descriptor in a list of referrers: digest, size, both types and the referrer tag, if any
// ([layout.ReferrerTag.Tagged]). InvalidArgument if it is malformed.
func ParseReferrer(raw []byte) (v1.Descriptor, error) {
	if !json.Valid(raw) {
		return v1.Descriptor{}, errclass.Errorf(errdefs.ErrInvalidArgument, "%.80q is not a descriptor of a referrer", raw)
	}
	d, _ := reference(raw)
	d.ArtifactType = member(raw, "artifactType")
	layout.Members(raw, func(key string, value json.RawMessage) {
		if strings.EqualFold(key, "annotations") {
			d.Annotations = keepTag(member(value, v1.AnnotationRefName))
		}
	})
	if err := content.Validate(d.Digest); err != nil {
		return d, err
	}
	return d, checkDescriptor(d)
}

// Subject returns the subject of a stored document, or "". NotFound if it isn't stored, DataLoss if it doesn't hash to
// its name.
func (w Walker) Subject(dgst digest.Digest) (digest.Digest, error) {
	b, err := w.blob(dgst)
	if err != nil {
		return "", err
	}
	return layout.Subject(b), nil
}

// Referrer describes a stored document as lists of referrers do, and returns its subject, or "". Errors are those of
// Subject.
func (w Walker) Referrer(dgst digest.Digest) (d v1.Descriptor, subject digest.Digest, err error) {
	b, err := w.blob(dgst)
	if err != nil {
		return d, "", err
	}
	if subject = layout.Subject(b); subject == "" {
		return d, "", nil
	}
	d = v1.Descriptor{MediaType: ownType(b), Digest: dgst, Size: int64(len(b))}
	d.ArtifactType, _ = layout.DescribeReferrer(b)
	return d, subject, nil
}

// Referrers calls f with each manifest in the namespace's index that has a subject, and with the subject. The
// descriptor has the artifact type.
func (n *Names) Referrers(f func(d v1.Descriptor, subject digest.Digest) error) error {
	err := n.dir.Referrers(MaxDocument, func(d v1.Descriptor, subject digest.Digest) error {
		tag := keepTag(d.Annotations[v1.AnnotationRefName])
		return f(v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, ArtifactType: d.ArtifactType, Annotations: tag}, subject)
	})
	if err != nil {
		return fmt.Errorf("list referrers: %w", err)
	}
	return nil
}

// ReferrersOf returns the result of Referrers by subject.
func (n *Names) ReferrersOf() (map[digest.Digest][]v1.Descriptor, error) {
	all := map[digest.Digest][]v1.Descriptor{}
	return all, n.Referrers(func(d v1.Descriptor, subject digest.Digest) error {
		all[subject] = append(all[subject], d)
		return nil
	})
}

// AddReferrers adds entries without a name to the index, in one change. Lists of referrers show them, and sweeps keep
// their documents as long as their subjects. Errors are those of [Names.Create], except AlreadyExists.
func (n *Names) AddReferrers(ctx context.Context, list []layout.Referrer) error {
	if len(list) == 0 {
		return nil
	}
	return n.change(ctx, func(ix *index) error {
		settled := slices.Clone(list)
		for i, r := range list {
			d, err := n.settle(ctx, v1.Descriptor{MediaType: r.MediaType, Digest: r.Digest, Size: r.Size})
			if err != nil {
				return fmt.Errorf("list %s: %w", r.Digest, err)
			}
			settled[i].Descriptor = d
		}
		added, err := ix.AddReferrers(settled...)
		if err == nil && !added {
			err = errUnchanged
		}
		return err
	})
}
