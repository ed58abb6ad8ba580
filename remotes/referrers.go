package remotes

import (
	"encoding/json"
	"errors"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// referrersTag is where referrers are listed at registries that know no such list: an index
// under a tag (OCI distribution specification, "Referrers Tag Schema").
func referrersTag(subject digest.Digest) object {
	s := subject.Algorithm().String() + "-" + subject.Encoded()
	return object{tag: s[:min(len(s), 128)]}
}

// referrer is what lists of referrers tell of a manifest.
type referrer struct {
	Subject      *ocispec.Descriptor `json:"subject"`
	ArtifactType string              `json:"artifactType"`
	Annotations  map[string]string   `json:"annotations"`
	Config       struct {
		MediaType string `json:"mediaType"`
	} `json:"config"`
}

func (r *referrer) describe(desc *ocispec.Descriptor) {
	if desc.ArtifactType = r.ArtifactType; desc.ArtifactType == "" {
		desc.ArtifactType = r.Config.MediaType
	}
	desc.Annotations = r.Annotations
}

// linkReferrer adds a manifest to the list under its subject's tag. Two that do so at once
// can lose one of theirs: the protocol has no way to prevent it.
func (p *push) linkReferrer(subject digest.Digest, desc ocispec.Descriptor, manifest []byte) error {
	if err := subject.Validate(); err != nil {
		return classf(errdefs.ErrInvalidArgument, "subject: %w", err)
	}
	var head referrer
	if err := decode(manifest, &head); err != nil {
		return err
	}
	head.describe(&desc)
	tag := referrersTag(subject)
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
	index.SchemaVersion = 2
	old, err := p.Registry.manifest(p.ctx, p.client, p.tries, tag, accept(ocispec.MediaTypeImageIndex))
	switch {
	case err == nil:
		if err := decode(old.content, &index); err != nil {
			return classf(errdefs.ErrDataLoss, "tag %s is not an index: %s", tag, printable(err.Error()))
		}
	case !errdefs.IsNotFound(err):
		return err
	}
	for _, m := range index.Manifests {
		if m.Digest == desc.Digest {
			return nil
		}
	}
	index.Manifests = append(index.Manifests, desc)
	b, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if len(b) > MaxManifest {
		return errors.New("the list of referrers is full")
	}
	_, err = p.putManifest(tag, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(b)}, b)
	return err
}
