package image

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's media types for what OCI adopted (docker/distribution, image manifest version 2, schema 2).
const (
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig       = "application/vnd.docker.container.image.v1+json"
)

// MaxDocument bounds the size of a manifest, index or config in bytes. maxObjects and maxMembers bound the memory for
// decoding one, and maxChildMembers that for an index or manifest, of which more is kept. MaxDepth bounds the nesting
// of indexes.
const (
	MaxDocument     = 8 << 20
	maxObjects      = 1 << 17
	maxMembers      = 1 << 19
	maxChildMembers = 1 << 17
	MaxDepth        = 4
)

// maxDigest bounds the length of a digest with an unknown algorithm.
const maxDigest = 1 << 10

// Walker follows descriptors through the blobs of a store.
type Walker struct {
	Store    *content.Store
	Platform *Platform // selects manifests of an index, best match first; nil selects all
	Tally    *Tally    // shared with other walks, so that limits apply to all together; nil for this walk alone
}

// document has the members of an index and of a manifest. The media type, or without one its members, decide which of
// them it is.
type document struct {
	MediaType string         `json:"mediaType"`
	Manifests Descriptors    `json:"manifests"`
	Config    *v1.Descriptor `json:"config"`
	Layers    Descriptors    `json:"layers"`
	Subject   *v1.Descriptor `json:"subject"`
}

// Descriptors decodes an array of descriptors with [EachDescriptor].
type Descriptors []v1.Descriptor

// UnmarshalJSON implements json.Unmarshaler.
func (list *Descriptors) UnmarshalJSON(b []byte) error {
	*list = nil
	if string(b) != "null" {
		*list = Descriptors{}
	}
	return EachDescriptor(b, func(d v1.Descriptor) error {
		*list = append(*list, d)
		return nil
	})
}

// EachDescriptor decodes a valid JSON array of descriptors, one after another. InvalidArgument if it has more than an
// image may have. null counts as empty.
func EachDescriptor(b []byte, f func(v1.Descriptor) error) error {
	n := 0
	var failed error
	array := layout.Elements(b, func(value json.RawMessage) {
		if n++; n > maxBlobs && failed == nil {
			failed = errclass.Errorf(errdefs.ErrInvalidArgument, "more than %d descriptors", maxBlobs)
		}
		if failed != nil {
			return
		}
		var d v1.Descriptor
		if failed = json.Unmarshal(value, &d); failed == nil {
			failed = f(d)
		}
	})
	if failed == nil && !array && string(b) != "null" {
		failed = errclass.Errorf(errdefs.ErrInvalidArgument, "not an array of descriptors")
	}
	return failed
}

// IsIndex reports whether a media type is that of an index, OCI's or Docker's.
func IsIndex(mediaType string) bool {
	return mediaType == v1.MediaTypeImageIndex || mediaType == dockerManifestList
}

// IsManifest reports whether a media type is that of a manifest, OCI's or Docker's.
func IsManifest(mediaType string) bool {
	return mediaType == v1.MediaTypeImageManifest || mediaType == dockerManifest
}

// Describe returns the descriptor of a blob in the store. An index, a manifest or another document that refers to blobs
// by descriptors has the media type that it states; any other blob is application/octet-stream. NotFound if the blob
// isn't stored.
func (w Walker) Describe(ctx context.Context, dgst digest.Digest) (v1.Descriptor, error) {
	size, err := w.Store.Size(dgst)
	if err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{MediaType: Octets, Digest: dgst, Size: size}
	b, err := w.blob(dgst)
	if err != nil || b == nil {
		return d, err
	}
	if mediaType, ok := TypeOf(b); ok {
		d.MediaType = mediaType
	}
	return d, nil
}

// TypeOf returns the media type that a document states. ok is false unless it is an index, a manifest, or another
// document that states its type and refers to blobs by descriptors.
func TypeOf(b []byte) (mediaType string, ok bool) {
	if doc, err := parseDocument("this", b); err == nil {
		return doc.MediaType, true
	}
	return foreignType(b)
}

// Parts returns the blobs that make a document complete: the manifests of an index, or the config and the layers of a
// manifest except those that nobody else may distribute. Any other document has no parts.
func Parts(document []byte) []v1.Descriptor {
	doc, err := parseDocument("this", document)
	if err != nil || doc.Config == nil {
		return doc.Manifests
	}
	parts := []v1.Descriptor{*doc.Config}
	for _, layer := range doc.Layers {
		if !IsForeign(layer.MediaType) {
			parts = append(parts, layer)
		}
	}
	return parts
}

// Target returns what ref points at. ref is a name that [Names.Lookup] finds, NAME@DIGEST, a digest, or the beginning of a
// blob's digest that [content.Store.Complete] completes. For a digest the image has no name. NotFound if the name or blob
// doesn't exist, InvalidArgument if the digest is malformed or its beginning ambiguous, NotImplemented if its algorithm is
// not supported.
func (w Walker) Target(ctx context.Context, names *Names, ref string) (Image, error) {
	img, dgst, err := names.find(ctx, ref, names.Lookup)
	if dgst != "" {
		img.Target, err = w.Describe(ctx, dgst)
	}
	return img, err
}

// read returns the content of a blob. DataLoss if it doesn't hash to its name, InvalidArgument if it is larger than
// MaxDocument.
func (w Walker) read(d v1.Descriptor) ([]byte, error) {
	f, err := w.Store.File(d.Digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size := max(d.Size, f.Size()); size > MaxDocument {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "read %s: %d bytes are too much for a manifest or config", d.Digest, size)
	}
	return readAll(f, d.Digest)
}

func readAll(f *content.File, dgst digest.Digest) ([]byte, error) {
	b := make([]byte, f.Size())
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, errRead(dgst, err)
	}
	if got := dgst.Algorithm().FromBytes(b); got != dgst {
		return nil, errclass.Errorf(errdefs.ErrDataLoss, "read %s: blob is corrupt, it hashes to %s", dgst, got)
	}
	return b, nil
}

func errRead(dgst digest.Digest, err error) error {
	return fmt.Errorf("read %s: %w", dgst, disk.Cause(err))
}

// document reads an index or manifest. InvalidArgument if the blob is neither.
func (w Walker) document(d v1.Descriptor) (document, error) {
	b, err := w.read(d)
	if err != nil {
		return document{}, err
	}
	return parseDocument(string(d.Digest), b)
}

// parseDocument parses an index or manifest. Error messages call it by name.
func parseDocument(name string, b []byte) (document, error) {
	var doc document
	if !small(b, maxChildMembers) {
		return doc, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is not a manifest or index: it has too many members", name)
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return doc, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is not a manifest or index: %w", name, err)
	}
	switch {
	case doc.MediaType == "" && doc.Config != nil && doc.Manifests == nil:
		doc.MediaType = v1.MediaTypeImageManifest
	case doc.MediaType == "" && doc.Manifests != nil && doc.Config == nil:
		doc.MediaType = v1.MediaTypeImageIndex
	}
	switch {
	case IsIndex(doc.MediaType) && doc.Config == nil && doc.Layers == nil:
	case IsManifest(doc.MediaType) && doc.Config != nil && doc.Manifests == nil:
	default:
		return doc, errclass.Errorf(errdefs.ErrInvalidArgument, "%s is not a manifest or index: media type %.80q", name, doc.MediaType)
	}
	if doc.Config != nil {
		if err := checkDescriptor(*doc.Config); err != nil {
			return doc, fmt.Errorf("config of %s: %w", name, err)
		}
	}
	for _, children := range []Descriptors{doc.Manifests, doc.Layers} {
		for _, child := range children {
			if err := checkDescriptor(child); err != nil {
				return doc, fmt.Errorf("child of %s: %w", name, err)
			}
		}
	}
	return doc, nil
}

// checkDescriptor refuses values that don't fit into a record or a path.
func checkDescriptor(d v1.Descriptor) error {
	// An unknown algorithm makes one blob unusable, but not the document that refers to it.
	if err := d.Digest.Validate(); err != nil && err != digest.ErrDigestUnsupported || len(d.Digest) > maxDigest {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "digest %.80q: %w", d.Digest, cmp.Or(err, digest.ErrDigestInvalidLength))
	}
	if d.Size < 0 {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "%s: size %d", d.Digest, d.Size)
	}
	if err := checkMediaType(d.MediaType); err != nil {
		return fmt.Errorf("%s: %w", d.Digest, err)
	}
	return nil
}

func checkMediaType(s string) error {
	if len(s) > 255 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "media type %.80q", s)
	}
	return nil
}

// Children returns the blobs that a document refers to: see [Node.Children]. For an index, media types are corrected by
// the blobs' content. Other blobs have no children. NotFound if the blob isn't stored or the index has no match.
func (w Walker) Children(ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
	var err error
	if d.Size, err = w.Store.Size(d.Digest); err != nil {
		return nil, err
	}
	n, err := w.node(ctx, d, true)
	if err == nil && IsIndex(n.Type) && w.Platform == nil {
		err = w.settleTypes(ctx, n.Children)
	}
	return n.Children, err
}

// settleTypes corrects the media types of an index's manifests.
func (w Walker) settleTypes(ctx context.Context, manifests []v1.Descriptor) (err error) {
	for i, m := range manifests {
		if manifests[i].MediaType, err = w.typeOf(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// typeOf returns the media type of a child of an index: that of its descriptor if it is a manifest's or an index's, or
// else that of the blob, if it is stored and is one of these.
func (w Walker) typeOf(ctx context.Context, d v1.Descriptor) (string, error) {
	if IsIndex(d.MediaType) || IsManifest(d.MediaType) || content.Validate(d.Digest) != nil {
		return d.MediaType, nil
	}
	actual, err := w.Describe(ctx, d.Digest)
	switch {
	case errdefs.IsNotFound(err):
		return d.MediaType, nil
	case err != nil:
		return "", err
	case IsIndex(actual.MediaType), IsManifest(actual.MediaType):
		return actual.MediaType, nil
	}
	return d.MediaType, nil
}

// pick returns the manifest of an index that matches the platform best, and the first of equals.
func (w Walker) pick(index digest.Digest, manifests []v1.Descriptor) (v1.Descriptor, error) {
	var matches []v1.Descriptor
	var others []string
	for _, m := range manifests {
		switch {
		case m.Platform == nil && m.MediaType != "" && !IsIndex(m.MediaType) && !IsManifest(m.MediaType):
			// not an image; checkpoints have such entries
		case m.Platform == nil: // an index inside, or a manifest without a platform: may match
			matches = append(matches, m)
		case w.Platform.Match(*m.Platform):
			matches = append(matches, m)
		case m.Platform.OS != "unknown":
			others = append(others, platforms.FormatAll(*m.Platform))
		}
	}
	if len(matches) == 0 {
		if len(others) == 0 {
			return v1.Descriptor{}, fmt.Errorf("index %s has no image: %w", index, errdefs.ErrNotFound)
		}
		if len(others) > 20 {
			others = append(others[:20], "…")
		}
		return v1.Descriptor{}, fmt.Errorf("index %s has nothing for %s, only for %s: %w",
			index, w.Platform, strings.Join(others, ", "), errdefs.ErrNotFound)
	}
	slices.SortStableFunc(matches, func(a, b v1.Descriptor) int {
		// A digest that no store can hold is the last choice.
		if a, b := content.Validate(a.Digest) != nil, content.Validate(b.Digest) != nil; a != b {
			if a {
				return 1
			}
			return -1
		}
		switch {
		case a.Platform == nil && b.Platform == nil:
			return 0
		case a.Platform == nil:
			return 1
		case b.Platform == nil || w.Platform.Less(*a.Platform, *b.Platform):
			return -1
		case w.Platform.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return matches[0], nil
}

// Manifest follows indexes down to the platform's manifest, and returns its descriptor. NotFound if there is no match,
// or a blob on the way isn't stored.
func (w Walker) Manifest(ctx context.Context, d v1.Descriptor) (v1.Descriptor, error) {
	d, _, err := w.manifest(ctx, d)
	return d, err
}

func (w Walker) manifest(ctx context.Context, d v1.Descriptor) (v1.Descriptor, document, error) {
	return w.descend(ctx, d, func(digest.Digest, []byte, int) {})
}

// descend is manifest. It calls through with each index on the way, its bytes, and the position of the manifest that it
// follows.
func (w Walker) descend(ctx context.Context, d v1.Descriptor, visit func(index digest.Digest, b []byte, child int)) (v1.Descriptor, document, error) {
	for range MaxDepth + 1 {
		b, err := w.read(d)
		if err != nil {
			return d, document{}, err
		}
		doc, err := parseDocument(string(d.Digest), b)
		if err != nil {
			return d, doc, err
		}
		if doc.Config != nil {
			if d.MediaType != doc.MediaType {
				d.MediaType = doc.MediaType
			}
			return d, doc, w.fits(ctx, d, *doc.Config)
		}
		if w.Platform == nil && len(doc.Manifests) != 1 {
			return d, doc, errclass.Errorf(errdefs.ErrInvalidArgument, "index %s has %d manifests: a platform is needed",
				d.Digest, len(doc.Manifests))
		}
		child := 0
		if w.Platform != nil {
			best, err := w.pick(d.Digest, doc.Manifests)
			if err != nil {
				return d, doc, err
			}
			child = slices.IndexFunc(doc.Manifests, func(m v1.Descriptor) bool { return m.Digest == best.Digest && m.Platform == best.Platform })
		}
		visit(d.Digest, b, child)
		d = doc.Manifests[child]
	}
	return d, document{}, errclass.Errorf(errdefs.ErrInvalidArgument, "indexes nest deeper than %d", MaxDepth)
}

// fits returns NotFound if a manifest is for another platform than the one that was asked for. Without an index, the
// config decides. A manifest for no platform, such as an artifact, fits.
func (w Walker) fits(ctx context.Context, d, config v1.Descriptor) error {
	if w.Platform == nil || !w.Platform.strict {
		return nil
	}
	p := d.Platform
	if p == nil {
		if config.MediaType != v1.MediaTypeImageConfig && config.MediaType != dockerConfig {
			return nil
		}
		b, err := w.read(config)
		if err != nil {
			return err
		}
		if err := Decode(b, &p); err != nil {
			return fmt.Errorf("config %s: %w", config.Digest, err)
		}
	}
	if p == nil || p.OS == "" && p.Architecture == "" || w.Platform.Match(*p) {
		return nil
	}
	return errclass.Errorf(errdefs.ErrNotFound, "manifest %s is for %.80s, not for %s", d.Digest, platforms.FormatAll(*p), w.Platform)
}

// Config returns the image config of the platform's manifest.
func (w Walker) Config(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	_, doc, err := w.manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	return w.read(*doc.Config)
}

// Layer is a layer of an image, with its IDs according to the config.
type Layer struct {
	v1.Descriptor
	DiffID  digest.Digest `json:"diffID"`  // of the uncompressed tar
	ChainID digest.Digest `json:"chainID"` // of this layer and all below (image-spec, config.md)
}

// Layers returns the layers of the platform's manifest, the lowest first. InvalidArgument if the config has another
// number of diff IDs.
func (w Walker) Layers(ctx context.Context, d v1.Descriptor) ([]Layer, error) {
	c, err := w.Contents(ctx, d)
	return c.Layers, err
}

// Contents are the parts of an image.
type Contents struct {
	Manifest v1.Descriptor
	Config   []byte // as stored
	Layers   []Layer
}

// Contents returns the platform's manifest, its config, and its layers. Errors are those of Layers.
func (w Walker) Contents(ctx context.Context, d v1.Descriptor) (Contents, error) {
	d, doc, err := w.manifest(ctx, d)
	if err != nil {
		return Contents{}, err
	}
	b, err := w.read(*doc.Config)
	if err != nil {
		return Contents{}, err
	}
	diffIDs, err := DiffIDs(b)
	if err != nil {
		return Contents{}, fmt.Errorf("config %s: %w", doc.Config.Digest, err)
	}
	if len(diffIDs) != len(doc.Layers) {
		return Contents{}, errclass.Errorf(errdefs.ErrInvalidArgument, "manifest %s has %d layers, its config %d diff IDs: it can't be unpacked",
			d.Digest, len(doc.Layers), len(diffIDs))
	}
	for _, id := range diffIDs {
		if err := id.Validate(); err != nil {
			return Contents{}, errclass.Errorf(errdefs.ErrInvalidArgument, "diff ID %.80q of config %s: %w", id, doc.Config.Digest, err)
		}
	}
	chain := identity.ChainIDs(slices.Clone(diffIDs))
	layers := make([]Layer, len(diffIDs))
	for i := range layers {
		layers[i] = Layer{doc.Layers[i], diffIDs[i], chain[i]}
	}
	return Contents{d, b, layers}, nil
}

// Missing returns the blobs of an image that aren't stored, as far as they are known. If a platform was asked for, the
// manifest must be for it.
func (w Walker) Missing(ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
	var missing []v1.Descriptor
	seen := map[digest.Digest]bool{}
	err := w.Walk(ctx, d, func(n Node) error {
		if !n.Here && !seen[n.Digest] {
			seen[n.Digest] = true
			missing = append(missing, n.Descriptor)
		}
		if !IsManifest(n.Type) {
			return nil
		}
		if _, err := w.Store.Size(n.Children[0].Digest); err != nil {
			return nil // the config is missing, or Walk fails on it
		}
		return w.fits(ctx, n.Descriptor, n.Children[0])
	})
	return missing, err
}

// Size returns the total size of the platform's manifest, its config and layers in bytes.
func (w Walker) Size(ctx context.Context, d v1.Descriptor) (int64, error) {
	d, doc, err := w.manifest(ctx, d)
	if err != nil {
		return 0, err
	}
	size := d.Size + doc.Config.Size
	for _, l := range doc.Layers {
		size += l.Size
	}
	return size, nil
}

// DiffIDs returns the diff IDs in an image config. It is nil if the config has no rootfs, and so isn't an image's.
// InvalidArgument if it isn't a JSON object.
func DiffIDs(config []byte) ([]digest.Digest, error) {
	var c struct {
		RootFS *v1.RootFS `json:"rootfs"`
	}
	if err := Decode(config, &c); err != nil || c.RootFS == nil {
		return nil, err
	}
	return append([]digest.Digest{}, c.RootFS.DiffIDs...), nil
}

// Put stores a new document, and returns its descriptor.
func (w Walker) Put(ctx context.Context, mediaType string, b []byte) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	return d, putDocument(ctx, w.Store, d.Digest, b)
}

// putDocument stores a manifest, index or config. InvalidArgument if it is larger than MaxDocument.
func putDocument(ctx context.Context, s *content.Store, dgst digest.Digest, b []byte) error {
	if len(b) > MaxDocument {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "a document of %d bytes, more than %d", len(b), MaxDocument)
	}
	_, err := content.WriteBlob(ctx, s, "document:"+string(dgst), bytes.NewReader(b), int64(len(b)), dgst)
	return err
}

// IsForeign reports whether a layer must not be distributed by others than its owner (image-spec, layer.md,
// non-distributable layers).
func IsForeign(mediaType string) bool {
	return strings.Contains(mediaType, ".nondistributable.") || strings.Contains(mediaType, ".foreign.")
}

// ReadDescriptor reads a descriptor as JSON. InvalidArgument if it is malformed.
func ReadDescriptor(r io.Reader) (v1.Descriptor, error) {
	var d v1.Descriptor
	if err := json.NewDecoder(io.LimitReader(r, MaxDocument)).Decode(&d); err != nil {
		return d, errclass.Errorf(errdefs.ErrInvalidArgument, "descriptor: %w", err)
	}
	if err := checkDescriptor(d); err != nil {
		return d, fmt.Errorf("descriptor: %w", err)
	}
	return d, nil
}
