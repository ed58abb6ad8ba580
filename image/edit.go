package image

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Part is a document of an image that is to be replaced, together with the manifest and the indexes that lead to it.
type Part struct {
	v1.Descriptor
	walker  Walker
	config  bool
	parents []link // the documents that lead to it, from the top
}

// link is a document and the descriptor in it that leads on: an element of manifests, or the config.
type link struct {
	dgst   digest.Digest
	bytes  []byte
	config bool
	child  int
}

// TargetPart returns the document that a descriptor points at: an index, a manifest or another document.
func (w Walker) TargetPart(ctx context.Context, d v1.Descriptor) (*Part, error) {
	is, err := w.Describe(ctx, d.Digest)
	if err != nil {
		return nil, err
	}
	return &Part{Descriptor: is, walker: w}, nil
}

// ManifestPart returns the platform's manifest.
func (w Walker) ManifestPart(ctx context.Context, d v1.Descriptor) (*Part, error) {
	p := &Part{walker: w}
	m, _, err := w.descend(ctx, d, func(index digest.Digest, b []byte, child int) {
		p.parents = append(p.parents, link{dgst: index, bytes: b, child: child})
	})
	p.Descriptor = m
	return p, err
}

// ConfigPart returns the config of the platform's manifest.
func (w Walker) ConfigPart(ctx context.Context, d v1.Descriptor) (*Part, error) {
	p, err := w.ManifestPart(ctx, d)
	if err != nil {
		return nil, err
	}
	b, err := w.read(p.Descriptor)
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(string(p.Digest), b)
	if err != nil {
		return nil, err
	}
	p.parents = append(p.parents, link{dgst: p.Digest, bytes: b, config: true})
	p.Descriptor, p.config = *doc.Config, true
	return p, nil
}

// Replace stores b in place of the part, and updates digest and size in every document that leads to it; all their
// other bytes stay. It returns the descriptor of the topmost document. The old documents stay in the store. The caller
// must hold the store against sweeps until the new image has a name.
//
// InvalidArgument: b is not a document of the part's kind, or a document that leads to it is ambiguous.
func (p *Part) Replace(ctx context.Context, b []byte) (v1.Descriptor, error) {
	d, err := p.describe(b)
	if err != nil {
		return d, err
	}
	type blob struct {
		v1.Descriptor
		bytes []byte
	}
	made := []blob{{d, b}}
	for _, l := range slices.Backward(p.parents) {
		child := made[len(made)-1]
		doc, b, err := l.relink(child.Descriptor, child.bytes)
		if err != nil {
			return d, fmt.Errorf("%s: %w", l.dgst, err)
		}
		made = append(made, blob{v1.Descriptor{MediaType: doc.MediaType, Digest: l.dgst.Algorithm().FromBytes(b), Size: int64(len(b))}, b})
	}
	for _, m := range made {
		if err := putDocument(ctx, p.walker.Store, m.Digest, m.bytes); err != nil {
			return d, err
		}
	}
	return made[len(made)-1].Descriptor, nil
}

// describe checks the bytes that are to replace the part, and returns their descriptor. An index must stay an index, a
// manifest a manifest, and an image config an image config.
func (p *Part) describe(b []byte) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: p.MediaType, Digest: p.Digest.Algorithm().FromBytes(b), Size: int64(len(b))}
	if d.Size > MaxDocument {
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "%d bytes are too many for a manifest, index or config", d.Size)
	}
	switch {
	case p.config && (p.MediaType == v1.MediaTypeImageConfig || p.MediaType == dockerConfig):
		if err := validateConfig(b); err != nil {
			return d, errclass.Errorf(errdefs.ErrInvalidArgument, "config: %w", err)
		}
	case !p.config && (IsIndex(p.MediaType) || IsManifest(p.MediaType)):
		doc, err := parseDocument("the edited document", b)
		if err != nil {
			return d, err
		}
		if IsIndex(doc.MediaType) != IsIndex(p.MediaType) {
			return d, errclass.Errorf(errdefs.ErrInvalidArgument, "the edited document is of type %s, but was of type %s", doc.MediaType, p.MediaType)
		}
		d.MediaType = doc.MediaType
	}
	return d, nil
}

// relink returns the document with the descriptor of to, whose bytes are b, in place of the one that leads on.
func (l link) relink(to v1.Descriptor, b []byte) (document, []byte, error) {
	found := 0
	descriptor := func(raw json.RawMessage) []byte {
		found++
		return repoint(raw, to, func() []byte { return b })
	}
	edited := layout.EditMembers(l.bytes, func(key string, value json.RawMessage) []byte {
		switch {
		case l.config && strings.EqualFold(key, "config"):
			return descriptor(value)
		case !l.config && strings.EqualFold(key, "manifests"):
			n := -1
			return layout.EditElements(value, func(value json.RawMessage) []byte {
				if n++; n == l.child {
					return descriptor(value)
				}
				return value
			})
		}
		return value
	})
	if found != 1 {
		return document{}, nil, errAmbiguous
	}
	doc, err := parseDocument(string(l.dgst), edited)
	if err != nil {
		return doc, nil, err
	}
	// A document may have a member twice, or in different case, and readers differ in which one counts. So check the
	// result.
	linked := doc.Config
	if !l.config {
		linked = nil
		if l.child < len(doc.Manifests) {
			linked = &doc.Manifests[l.child]
		}
	}
	if linked == nil || linked.Digest != to.Digest || linked.Size != to.Size {
		return doc, nil, errAmbiguous
	}
	return doc, edited, nil
}

// repoint changes the digest, size and type of a descriptor to those of another document. If the descriptor embeds the
// old document (data), it embeds the bytes of the new one instead, or none if bytes returns nil. Everything else stays.
func repoint(raw json.RawMessage, to v1.Descriptor, bytes func() []byte) []byte {
	return layout.EditMembers(raw, func(key string, value json.RawMessage) []byte {
		switch strings.ToLower(key) {
		case "digest":
			return quote(string(to.Digest))
		case "size":
			return fmt.Append(nil, to.Size)
		case "mediatype":
			if s, _ := shortString(value); s != to.MediaType {
				quoted, _ := json.Marshal(to.MediaType)
				return quoted
			}
		case "data":
			b := bytes()
			if b == nil {
				return nil
			}
			return quote(base64.StdEncoding.EncodeToString(b))
		}
		return value
	})
}

var errAmbiguous = errclass.Errorf(errdefs.ErrInvalidArgument, "it doesn't have exactly one config or list of manifests, with one digest and one size in each descriptor")

// Move makes a name point at target, if it still points at the digest from. Labels stay, except those that describe the
// old content. FailedPrecondition if the name points elsewhere, NotFound if it doesn't exist.
func (n *Names) Move(ctx context.Context, name string, from digest.Digest, target v1.Descriptor) (Image, error) {
	var img Image
	err := n.changeExisting(ctx, func(ix *index) error {
		i := ix.Find(name)
		var err error
		if img, err = get(ix.Index, name, i); err != nil {
			return err
		}
		if img.Target.Digest != from {
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "image %s points at %s now, no longer at %s", name, img.Target.Digest, from)
		}
		if target, err = n.settle(ctx, target); err != nil {
			return fmt.Errorf("name %s: %w", name, err)
		}
		if err := img.set(Image{Target: target}, "target"); err != nil {
			return err
		}
		img.UpdatedAt = time.Now().UTC()
		ix.changed(img, false)
		ix.Entries[i], err = img.entry()
		return err
	})
	return img, err
}
