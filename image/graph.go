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

// Octets is the media type of a blob that isn't a manifest or an index.
const Octets = "application/octet-stream"

// walk calls visit with root, and then with the descriptors that visit returned, depth first, in their order. Each
// digest is visited once. depth is the number of descriptors above. Nesting takes memory but no stack; visit must bound
// it. seen has the digests to skip, and receives those that are visited.
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

// MaxDocuments bounds the total size of an image's documents in bytes, and maxBlobs the number of blobs that they refer
// to.
const (
	MaxDocuments = 256 << 20
	maxBlobs     = 1 << 15
)

// Tally counts what walks visit, so that one limit applies to several walks together.
type Tally struct {
	blobs int
	size  int64
}

// Add counts blobs that are referred to, and bytes of documents. InvalidArgument if a total exceeds its limit.
func (t *Tally) Add(blobs int, size int64) error {
	t.blobs += blobs
	t.size += size
	if t.blobs > maxBlobs || t.size > MaxDocuments {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "more than %d blobs are referred to, or documents of more than %d bytes", maxBlobs, MaxDocuments)
	}
	return nil
}

// Node is a blob visited by [Walker.Walk].
type Node struct {
	v1.Descriptor // from the document that refers to the blob
	// Type is the media type according to the blob's own content: that of an index, a manifest, or another document
	// that refers to blobs by descriptors. It is "" for any other blob, and for one that isn't in the store.
	Type string
	Here bool // whether it is in the store
	// Part is true for a blob that a manifest refers to, such as its config or a layer. Its content is not examined.
	Part bool
	// Children are the blobs that a document refers to: an index's manifests, or only the best match if the walker has
	// a platform; a manifest's config and layers; all blobs named by another document except its subject.
	Children []v1.Descriptor
}

// Walk calls visit with d and everything that d refers to, parents before children, in the order of the documents.
// Whether a blob is a document is decided by its content, not by the media type in its descriptor. Each blob is visited
// once, or twice if it is both a part and a document. What a missing blob refers to is unknown.
//
// DataLoss: a document doesn't hash to its name, or a blob's size differs from its descriptor. InvalidArgument: a blob
// should be an index or manifest, according to its descriptor or itself, but isn't valid; or a limit on the depth of
// indexes, the number of blobs or the size of documents is exceeded. NotFound: an index has nothing for the platform.
func (w Walker) Walk(ctx context.Context, d v1.Descriptor, visit func(Node) error) error {
	return w.walk(ctx, d, map[digest.Digest]bool{}, visit)
}

// walk is Walk, but skips the documents in seen, and adds those that it visits.
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

// here reports whether a blob is in the store. DataLoss if its size differs from its descriptor.
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

// node examines a blob that may be a document. The target of a name (root) may also get its type from the name's
// descriptor.
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
		_, err = w.document(d) // returns the reason why it is not one
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

// choose returns the blobs that a document refers to; for an index, only the best match if a platform is set.
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

// blob reads a blob that may be a document: a JSON object of at most MaxDocument bytes. It returns nil for any other
// blob. NotFound if the blob isn't stored, DataLoss if it doesn't hash to its name.
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

// small reports whether decoding a document takes little memory, judged by its number of members and objects.
func small(b []byte, members int) bool {
	return bytes.Count(b, []byte("{")) <= maxObjects && bytes.Count(b, []byte(",")) <= members
}

// Decode is json.Unmarshal for untrusted documents. InvalidArgument if b is too large, or has so many members that
// decoding would take many times its size.
func Decode(b []byte, v any) error {
	if len(b) > MaxDocument || !small(b, maxMembers) {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "it has more than %d bytes, %d objects or %d members", MaxDocument, maxObjects, maxMembers)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errclass.As(err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// references calls f with every descriptor that is a member of a document, or an element of an array that is a member,
// whatever the member's name: manifests, config, layers, subject, and those of unknown kinds of manifests. The document
// must be valid JSON. Descriptors with a digest that no store can hold are skipped.
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

// appendStored appends a descriptor if the store has the blob. Digests of missing blobs take no memory, however many a
// document has.
func appendStored(list []v1.Descriptor, s *content.Store, d v1.Descriptor) (all []v1.Descriptor, stored bool) {
	if _, err := s.Path(d.Digest); errdefs.IsNotFound(err) {
		return list, false
	}
	return append(list, v1.Descriptor{Digest: d.Digest, MediaType: d.MediaType}), true
}

// reference takes digest, size and media type from a descriptor. Like encoding/json it accepts keys in any case.
// blobSum (Docker's schema 1) counts as the digest.
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

// maxLayers bounds the number of layers; the kernel mounts at most 500.
const maxLayers = 1024

// chains returns the chain IDs of the layers in an image config, up to the first invalid diff ID. The config must be
// valid JSON.
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

// ownType returns the media type that a document states itself, or "".
func ownType(b []byte) string { return member(b, "mediaType") }

// member returns a short string member of an object, or "".
func member(b []byte, name string) (text string) {
	layout.Members(b, func(key string, value json.RawMessage) {
		if strings.EqualFold(key, name) {
			text, _ = shortString(value)
		}
	})
	return text
}

// foreignType returns the media type of a document of an unknown kind that states a type and refers to blobs by
// descriptors.
func foreignType(b []byte) (mediaType string, ok bool) {
	mediaType = ownType(b)
	return mediaType, mediaType != "" && mediaType != Octets && !isKnown(mediaType) && checkMediaType(mediaType) == nil && refers(b)
}
