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

// ReferrerTag is a tag that attaches a manifest to another one by its name alone, as cosign does: sha256-HEX.sig, .att or .sbom.
type ReferrerTag struct{ Tag, ArtifactType string }

// suffixes are those of such tags, and the artifact types that cosign gives to the same documents if they refer to a subject.
var suffixes = []ReferrerTag{
	{".sig", "application/vnd.dev.cosign.artifact.sig.v1+json"},
	{".att", "application/vnd.dev.cosign.artifact.att.v1+json"},
	{".sbom", "application/vnd.dev.cosign.artifact.sbom.v1+json"},
}

// ReferrerTags returns the tags that attach manifests to a subject, those of an artifact type alone unless that is empty. A digest that is
// too long for a tag has none.
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

// ParseReferrerTag reads a tag, or a name that ends with one.
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

// Tagged describes a manifest as lists of referrers do if a tag attaches it: the tag is its annotation org.opencontainers.image.ref.name.
func (t ReferrerTag) Tagged(d v1.Descriptor) v1.Descriptor {
	d.ArtifactType, d.Annotations = t.ArtifactType, map[string]string{v1.AnnotationRefName: t.Tag}
	return d
}

// Referrers calls f once with each document of the index, of at most maxSize bytes, that has a subject: its descriptor, with
// what lists of referrers tell of it, and its subject. Nobody has hashed the document. Documents that are not in the layout
// are passed over: an image may be here in part. Documents that a name or [AnnotationTag] attaches to a subject count, too, once for each tag.
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

// ReadBlob reads a blob of at most maxSize bytes; a larger one is FailedPrecondition. Its digest is not verified.
func (d Dir) ReadBlob(dgst digest.Digest, maxSize int64) ([]byte, error) {
	f, err := d.OpenBlob(dgst)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return disk.ReadAll(f, maxSize)
}

// Subject returns the digest of a document's subject, or "" if it has none.
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

// maxAnnotations bounds the annotations that a list of referrers shows of one document, in bytes of JSON.
const maxAnnotations = 256 << 10

// DescribeReferrer returns what lists of referrers tell of a document, which is valid JSON: the type of the artifact, which
// is its config's if it has none itself, and its annotations (OCI distribution specification, "Listing Referrers").
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

// shortType returns a media type, "" if it is longer than RFC 6838 allows.
func shortType(raw json.RawMessage) (s string) {
	if len(raw) <= 2+255 {
		_ = json.Unmarshal(raw, &s)
	}
	return s
}

// Annotations of an entry without a name: the subject that its document refers to, and the tag that says so instead (see
// [ReferrerTags]). Sweeps keep what the entry points at only as long as they keep the subject.
const (
	AnnotationSubject = "distkit.subject"
	AnnotationTag     = "distkit.tag"
)

// Referrer is a document that refers to a subject: by itself, or by a tag that it has at registries.
type Referrer struct {
	v1.Descriptor
	Subject digest.Digest
	Tag     string // "" if the document refers to the subject by itself
}

// AddReferrers adds entries without a name, those that are not there yet. Lists of referrers are made from them. An entry with a name
// doesn't count: the name may move.
func (ix *Index) AddReferrers(list ...Referrer) (added bool, err error) {
	type key struct {
		digest digest.Digest
		tag    string
	}
	there := make(map[key]bool, len(ix.Entries))
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
			there[key{d.Digest, tag}] = true
		}
	}
	for _, r := range list {
		if there[key{r.Digest, r.Tag}] {
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
		ix.Entries, there[key{r.Digest, r.Tag}], added = append(ix.Entries, e), true, true
	}
	return added, nil
}

// DependsOn returns the subject without which sweeps don't keep the entry, or "": the entry counts by itself.
func (e Entry) DependsOn() (subject digest.Digest) {
	if e.Name != "" || e.Strange || !bytes.Contains(e.Raw, []byte(AnnotationSubject)) {
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
