package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Octets is the media type of what is no manifest or index.
const Octets = "application/octet-stream"

// walk calls visit with a descriptor, and then with those that visit returned for it, each digest once, in the order of
// the documents: what an entry leads to comes before the next entry. depth is the number of descriptors above. Nesting
// takes memory and no stack; how deep it may be is visit's business. seen is what was visited already, and is added to.
func walk(ctx context.Context, root v1.Descriptor, seen map[digest.Digest]bool, visit func(d v1.Descriptor, depth int) ([]v1.Descriptor, error)) error {
	type step struct {
		v1.Descriptor
		depth int
	}
	next := []step{{root, 0}}
	for len(next) > 0 {
		s := next[len(next)-1]
		next = next[:len(next)-1]
		if seen[s.Digest] {
			continue
		}
		seen[s.Digest] = true
		if err := ctx.Err(); err != nil {
			return err
		}
		children, err := visit(s.Descriptor, s.depth)
		if err != nil {
			return err
		}
		for _, c := range slices.Backward(children) {
			if !seen[c.Digest] {
				next = append(next, step{c, s.depth + 1})
			}
		}
	}
	return nil
}

// MaxDocuments bounds all documents of an image, in bytes, and maxBlobs the blobs that they refer to.
const (
	MaxDocuments = 256 << 20
	maxBlobs     = 1 << 15
)

// Tally counts what walks come to, so that the limits of one walk hold for several together.
type Tally struct {
	blobs int
	size  int64
}

// Add counts blobs that are referred to, and bytes of documents. InvalidArgument if they are too many now.
func (t *Tally) Add(blobs int, size int64) error {
	t.blobs += blobs
	t.size += size
	if t.blobs > maxBlobs || t.size > MaxDocuments {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "more than %d blobs are referred to, or documents of more than %d bytes", maxBlobs, MaxDocuments)
	}
	return nil
}

// Node is a blob that [Walker.Walk] has come to.
type Node struct {
	v1.Descriptor // as the document that refers to the blob has it
	// Type is the media type that the blob itself tells: of an index, a manifest, or a document of another kind that
	// refers to blobs by descriptors. It is empty for every other blob, and for one that is not in the store.
	Type string
	Here bool // in the store
	// Part is true for what a manifest refers to: its config, its layers and the like. What a part holds is not looked
	// at.
	Part bool
	// Children are what a document refers to: an index to manifests, only to the best for the walker's platform if one
	// is set; a manifest to its config and layers; a document of another kind to all blobs that it names, but not to
	// its subject.
	Children []v1.Descriptor
}

// Walk calls visit with d and with everything that d refers to, parents before children, in the order of the documents.
// The blobs tell what is a document, whatever media types the descriptors have. Each blob is visited once, or twice if
// it is both a part and a document. What a blob refers to that is not in the store can't be known.
//
// DataLoss: a document does not hash to its name, or a blob has another size than its descriptor says. InvalidArgument:
// a descriptor, or the blob itself, says that a blob is an index or manifest, and the blob is none; or indexes nest too
// deep, or the image refers to too many blobs, or its documents are too large together. NotFound: an index has nothing
// for the platform.
func (w Walker) Walk(ctx context.Context, d v1.Descriptor, visit func(Node) error) error {
	return w.walk(ctx, d, map[digest.Digest]bool{}, visit)
}

// walk is Walk that passes over the documents of seen, and adds those that it visits.
func (w Walker) walk(ctx context.Context, d v1.Descriptor, seen map[digest.Digest]bool, visit func(Node) error) error {
	parts := map[digest.Digest]bool{}
	tally := w.Tally
	if tally == nil {
		tally = &Tally{}
	}
	return walk(ctx, d, seen, func(d v1.Descriptor, depth int) ([]v1.Descriptor, error) {
		if depth > MaxDepth {
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "indexes nest deeper than %d", MaxDepth)
		}
		n, err := w.node(ctx, d, depth == 0)
		if err != nil {
			return nil, err
		}
		size := int64(0)
		if n.Type != "" {
			size = n.Size
		}
		if err := tally.Add(len(n.Children), size); err != nil {
			return nil, fmt.Errorf("%s: %w", d.Digest, err)
		}
		if err := visit(n); err != nil {
			return nil, err
		}
		if IsIndex(n.Type) {
			return n.Children, nil
		}
		for _, c := range n.Children {
			if parts[c.Digest] {
				continue
			}
			parts[c.Digest] = true
			part := Node{Descriptor: c, Part: true}
			if part.Here, err = w.here(ctx, c); err != nil {
				return nil, err
			}
			if err := visit(part); err != nil {
				return nil, err
			}
		}
		return nil, nil
	})
}

// here reports whether a blob is in the store. DataLoss if it has another size than its descriptor says.
func (w Walker) here(ctx context.Context, d v1.Descriptor) (bool, error) {
	size, err := w.Store.Size(d.Digest)
	if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) {
		return false, nil
	}
	if err == nil && size != d.Size {
		err = errclass.Errorf(errdefs.ErrDataLoss, "%s has %d bytes, its descriptor says %d", d.Digest, size, d.Size)
	}
	return err == nil, err
}

// node looks at a blob that may be a document. What a name points at (root) is one also if its type is not its own, but
// the name's.
func (w Walker) node(ctx context.Context, d v1.Descriptor, root bool) (Node, error) {
	n := Node{Descriptor: d}
	var err error
	if n.Here, err = w.here(ctx, d); err != nil || !n.Here {
		return n, err
	}
	known := isKnown(d.MediaType)
	b, err := w.blob(d.Digest)
	if err != nil {
		return n, err
	}
	if b == nil && known {
		_, err = w.document(d) // says why it is none
		return n, err
	}
	if b == nil {
		return n, nil
	}
	doc, err := parseDocument(string(d.Digest), b)
	switch {
	case err == nil:
		n.Type = doc.MediaType
		n.Children, err = w.choose(ctx, d.Digest, doc)
		return n, err
	case known || isKnown(ownType(b)):
		return n, err
	}
	foreign, ok := foreignType(b)
	if !ok && root && d.MediaType != "" && d.MediaType != Octets {
		foreign, ok = d.MediaType, refers(b)
	}
	if !ok {
		return n, nil
	}
	n.Type = foreign
	references(b, func(key string, c v1.Descriptor) {
		if key != "subject" && len(n.Children) <= maxBlobs {
			n.Children = append(n.Children, c)
		}
	})
	return n, nil
}

// choose returns what a document refers to: of an index only the best manifest for the platform, if one is set.
func (w Walker) choose(ctx context.Context, dgst digest.Digest, doc document) ([]v1.Descriptor, error) {
	if doc.Config != nil {
		return append([]v1.Descriptor{*doc.Config}, doc.Layers...), nil
	}
	if w.Platform == nil {
		return doc.Manifests, nil
	}
	if err := w.settleTypes(ctx, doc.Manifests); err != nil {
		return nil, err
	}
	best, err := w.pick(dgst, doc.Manifests)
	return []v1.Descriptor{best}, err
}

// blob reads a blob that may be a document: a JSON object that is not larger than MaxDocument. Of any other it returns
// nil. NotFound if there is none; DataLoss if it does not hash to its name.
func (w Walker) blob(dgst digest.Digest) ([]byte, error) {
	f, err := w.Store.File(dgst)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > MaxDocument {
		return nil, nil
	}
	var head [64]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, errRead(dgst, err)
	}
	if rest := bytes.TrimLeft(head[:n], " \t\r\n"); len(rest) > 0 && rest[0] != '{' {
		return nil, nil
	}
	b, err := readAll(f, dgst)
	if err != nil || !json.Valid(b) {
		return nil, err
	}
	return b, nil
}

// small reports whether a document has so few members and objects that decoding it takes little memory.
func small(b []byte, members int) bool {
	return bytes.Count(b, []byte("{")) <= maxObjects && bytes.Count(b, []byte(",")) <= members
}

// Decode is json.Unmarshal of what strangers wrote: InvalidArgument if it is too large, or has so many members that
// decoding it would take many times its size.
func Decode(b []byte, v any) error {
	if len(b) > MaxDocument || !small(b, maxMembers) {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "it has more than %d bytes, %d objects or %d members", MaxDocument, maxObjects, maxMembers)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errclass.As(err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// references calls f with every descriptor that a document, valid JSON, has for a member, or in an array that is a
// member, whatever their names: manifests, config, layers, subject, and what else manifests of other kinds have.
// Descriptors whose digest no store can have are left out.
func references(b []byte, f func(key string, d v1.Descriptor)) {
	layout.Members(b, func(key string, value json.RawMessage) {
		one := func(value json.RawMessage) {
			if d, ok := reference(value); ok {
				f(strings.ToLower(key), d)
			}
		}
		one(value)
		layout.Elements(value, one)
	})
}

// appendStored appends what a document refers to if the store has it. What the store lacks takes no memory, however many digests
// a document has.
func appendStored(list []v1.Descriptor, s *content.Store, d v1.Descriptor) (all []v1.Descriptor, stored bool) {
	if _, err := s.Path(d.Digest); errdefs.IsNotFound(err) {
		return list, false
	}
	return append(list, v1.Descriptor{Digest: d.Digest, MediaType: d.MediaType}), true
}

// reference reads of a descriptor what says which blob it is and of what type. Like encoding/json it takes keys in any
// case; of several digests, all mean it (docker's schema 1 has blobSum).
func reference(raw json.RawMessage) (d v1.Descriptor, ok bool) {
	layout.Members(raw, func(key string, value json.RawMessage) {
		switch strings.ToLower(key) {
		case "digest", "blobsum":
			if s, text := shortString(value); text && content.Validate(digest.Digest(s)) == nil {
				d.Digest, ok = digest.Digest(s), true
			}
		case "mediatype":
			d.MediaType, _ = shortString(value)
		case "size":
			_ = json.Unmarshal(value, &d.Size)
		}
	})
	return d, ok
}

func shortString(raw json.RawMessage) (s string, ok bool) {
	if len(raw) < 2 || len(raw) > 2048 || raw[0] != '"' {
		return "", false
	}
	if inner := raw[1 : len(raw)-1]; bytes.IndexByte(inner, '\\') < 0 && utf8.Valid(inner) {
		return string(inner), true
	}
	return s, json.Unmarshal(raw, &s) == nil
}

// maxLayers bounds the layers of an image: the kernel mounts no more than 500.
const maxLayers = 1024

// chains returns the chain IDs of the layers that an image config, valid JSON, names, as far as they can be told.
func chains(b []byte) []digest.Digest {
	var ids []digest.Digest
	bad := false
	layout.Members(b, func(key string, value json.RawMessage) {
		if !strings.EqualFold(key, "rootfs") {
			return
		}
		layout.Members(value, func(key string, value json.RawMessage) {
			if !strings.EqualFold(key, "diff_ids") {
				return
			}
			ids, bad = nil, false
			layout.Elements(value, func(value json.RawMessage) {
				s, ok := shortString(value)
				if bad = bad || !ok || len(ids) == maxLayers || digest.Digest(s).Validate() != nil; !bad {
					ids = append(ids, digest.Digest(s))
				}
			})
		})
	})
	return identity.ChainIDs(ids)
}

func refers(b []byte) (yes bool) {
	references(b, func(string, v1.Descriptor) { yes = true })
	return yes
}

func isKnown(mediaType string) bool { return IsIndex(mediaType) || IsManifest(mediaType) }

// ownType returns the media type that a document tells, or "".
func ownType(b []byte) string { return member(b, "mediaType") }

// member returns the short text that an object has for a member, or "".
func member(b []byte, name string) (text string) {
	layout.Members(b, func(key string, value json.RawMessage) {
		if strings.EqualFold(key, name) {
			text, _ = shortString(value)
		}
	})
	return text
}

// foreignType returns the media type of a document that is a manifest of a kind that isn't known here: it tells its own
// type, and refers to blobs by descriptors.
func foreignType(b []byte) (mediaType string, ok bool) {
	mediaType = ownType(b)
	return mediaType, mediaType != "" && mediaType != Octets && !isKnown(mediaType) && checkMediaType(mediaType) == nil && refers(b)
}
