package layout

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"distkit/disk"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ReferrerTag is a tag that attaches a manifest to another by naming convention, as cosign does: sha256-HEX.sig, .att
// or .sbom. ArtifactType is the type of the attached document.
type ReferrerTag struct{ Tag, ArtifactType string }

// suffixes are the suffixes of referrer tags, with the artifact types that cosign uses for the same documents when they
// have a subject field.
var suffixes = []ReferrerTag{
	{".sig", "application/vnd.dev.cosign.artifact.sig.v1+json"},
	{".att", "application/vnd.dev.cosign.artifact.att.v1+json"},
	{".sbom", "application/vnd.dev.cosign.artifact.sbom.v1+json"},
}

// ReferrerTags returns the tags that may attach manifests to a subject. If artifactType is not empty, only tags of that
// type are returned. Only SHA-256 digests have such tags; others are too long.
func ReferrerTags(subject digest.Digest, artifactType string) (tags []ReferrerTag) {
	if subject.Algorithm() != digest.SHA256 {
		return nil
	}
	for _, s := range suffixes {
		if artifactType == "" || artifactType == s.ArtifactType {
			tags = append(tags, ReferrerTag{"sha256-" + subject.Encoded() + s.Tag, s.ArtifactType})
		}
	}
	return tags
}

// ParseReferrerTag parses a referrer tag, or a name that ends with one.
func ParseReferrerTag(name string) (tag ReferrerTag, subject digest.Digest, ok bool) {
	tag.Tag = name[strings.LastIndexByte(name, ':')+1:]
	hex, ok := strings.CutPrefix(tag.Tag, "sha256-")
	if !ok {
		return tag, "", false
	}
	for _, s := range suffixes {
		if hex, found := strings.CutSuffix(hex, s.Tag); found {
			subject, tag.ArtifactType = digest.Digest("sha256:"+hex), s.ArtifactType
			return tag, subject, subject.Validate() == nil
		}
	}
	return tag, "", false
}

// Tagged returns a manifest's descriptor as a list of referrers shows a manifest attached by a tag: with the tag's
// artifact type, and the tag as the annotation org.opencontainers.image.ref.name.
func (t ReferrerTag) Tagged(d v1.Descriptor) v1.Descriptor {
	d.ArtifactType, d.Annotations = t.ArtifactType, map[string]string{v1.AnnotationRefName: t.Tag}
	return d
}

// Referrers calls f once for each document in the index that has a subject. desc is the document's descriptor as lists
// of referrers show it. A document that a name or [AnnotationTag] attaches to a subject counts too, once per tag.
// Documents of more than maxSize bytes are skipped, as are those that the layout doesn't have, since an image may be
// here in part. Digests are not verified.
func (d Dir) Referrers(maxSize int64, f func(desc v1.Descriptor, subject digest.Digest) error) error {
	ix, err := d.ReadIndex()
	if err != nil {
		return err
	}
	seen, tagged := map[digest.Digest]bool{}, map[string]bool{}
	for _, e := range ix.Entries {
		desc, err := e.Descriptor()
		if err != nil {
			return err
		}
		if desc.Digest.Validate() != nil || desc.Size > maxSize {
			continue
		}
		tag, subject, ok := ParseReferrerTag(cmp.Or(e.Name, desc.Annotations[AnnotationTag]))
		if key := tag.Tag + string(desc.Digest); ok && !tagged[key] {
			tagged[key] = true
			_, _, err := d.FindBlob(desc.Digest)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("find %s: %w", desc.Digest, err)
			}
			if err := f(tag.Tagged(desc), subject); err != nil {
				return err
			}
		}
		if seen[desc.Digest] {
			continue
		}
		seen[desc.Digest] = true
		b, err := d.ReadBlob(desc.Digest, maxSize)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", desc.Digest, err)
		}
		if subject := Subject(b); subject != "" {
			desc.ArtifactType, desc.Annotations = DescribeReferrer(b)
			if err := f(desc, subject); err != nil {
				return err
			}
		}
	}
	return nil
}

// ReadBlob reads a blob without verifying its digest. A blob of more than maxSize bytes is FailedPrecondition.
func (d Dir) ReadBlob(dgst digest.Digest, maxSize int64) ([]byte, error) {
	f, err := d.OpenBlob(dgst)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return disk.ReadAll(f, maxSize)
}

// Subject returns the digest of a document's subject, or "".
func Subject(document []byte) (subject digest.Digest) {
	if !json.Valid(document) {
		return ""
	}
	Members(document, func(key string, value json.RawMessage) {
		if !strings.EqualFold(key, "subject") {
			return
		}
		var s struct{ Digest digest.Digest }
		if subject = ""; json.Unmarshal(value, &s) == nil && s.Digest.Validate() == nil {
			subject = s.Digest
		}
	})
	return subject
}

// maxAnnotations bounds a document's annotations in a list of referrers, in bytes of JSON.
const maxAnnotations = 256 << 10

// DescribeReferrer returns a document's artifact type and annotations as lists of referrers show them (OCI distribution
// specification, "Listing Referrers"). The type defaults to that of the config. document must be valid JSON.
func DescribeReferrer(document []byte) (artifactType string, annotations map[string]string) {
	config := ""
	Members(document, func(key string, value json.RawMessage) {
		switch strings.ToLower(key) {
		case "artifacttype":
			artifactType = shortType(value)
		case "config":
			config = ""
			Members(value, func(key string, value json.RawMessage) {
				if strings.EqualFold(key, "mediaType") {
					config = shortType(value)
				}
			})
		case "annotations":
			if annotations = nil; len(value) <= maxAnnotations {
				_ = json.Unmarshal(value, &annotations)
			}
		}
	})
	return cmp.Or(artifactType, config), annotations
}

// shortType decodes a media type. It is "" if it is longer than RFC 6838 allows.
func shortType(raw json.RawMessage) (s string) {
	if len(raw) <= 2+255 {
		_ = json.Unmarshal(raw, &s)
	}
	return s
}

// Annotations of an entry without a name: the subject that its document refers to, and, for a document attached by a
// tag, that tag (see [ReferrerTags]). Sweeps keep what the entry points at only as long as they keep the subject.
const (
	AnnotationSubject = "distkit.subject"
	AnnotationTag     = "distkit.tag"
)

// Referrer is a document that refers to a subject, either in its subject field or by a tag at a registry.
type Referrer struct {
	v1.Descriptor
	Subject digest.Digest
	Tag     string // "" if the document has a subject field
}

// AddReferrers adds an entry without a name for each referrer that has no such entry yet. Lists of referrers are made
// from these entries. An entry with a name doesn't count, because the name may come to point elsewhere.
func (ix *Index) AddReferrers(list ...Referrer) (added bool, err error) {
	type key struct {
		digest digest.Digest
		tag    string
	}
	present := make(map[key]bool, len(ix.Entries))
	for _, e := range ix.Entries {
		if e.Name != "" {
			continue
		}
		tag := ""
		d, err := e.Target(func(key, value string) {
			if key == AnnotationTag {
				tag = value
			}
		})
		if err == nil {
			present[key{d.Digest, tag}] = true
		}
	}
	for _, r := range list {
		if present[key{r.Digest, r.Tag}] {
			continue
		}
		d := r.Descriptor
		d.Annotations = map[string]string{AnnotationSubject: string(r.Subject)}
		if r.Tag != "" {
			d.Annotations[AnnotationTag] = r.Tag
		}
		e, err := NewEntry(d)
		if err != nil {
			return false, err
		}
		ix.Entries, present[key{r.Digest, r.Tag}], added = append(ix.Entries, e), true, true
	}
	return added, nil
}

// DependsOn returns the subject without which a sweep doesn't keep the entry's target, or "" if the entry keeps its
// target by itself.
func (e Entry) DependsOn() (subject digest.Digest) {
	if e.Name != "" || e.Malformed || !bytes.Contains(e.Raw, []byte(AnnotationSubject)) {
		return ""
	}
	_, err := e.Target(func(key, value string) {
		if key == AnnotationSubject {
			subject = digest.Digest(value)
		}
	})
	if err != nil || subject.Validate() != nil {
		return ""
	}
	return subject
}
