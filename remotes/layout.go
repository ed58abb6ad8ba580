package remotes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"distkit/disk"
	ondisk "distkit/disk/layout"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layout is a directory in the form of an OCI image layout, such as a store. Its names are those in index.json. An
// object is named by a full name, a tag or a digest.
type Layout struct {
	dir                  string
	ifAbsent, unverified bool // see Options
}

// files opens the layout, and checks its version. NotFound if the directory is not a layout.
func (l *Layout) files() (ondisk.Dir, error) {
	d, err := ondisk.Open(l.dir)
	if err != nil {
		return d, err
	}
	err = d.Check()
	if !errors.Is(err, fs.ErrNotExist) {
		return d, err
	}
	// Without oci-layout, it may still be a store that is being created: then blobs/ exists.
	if _, err := d.Tree.Stat(ocispec.ImageBlobsDir); err != nil {
		return d, classf(errdefs.ErrNotFound, "not an OCI image layout: %w", disk.Cause(err))
	}
	return d, nil
}

// index returns the entries of index.json.
func index(d ondisk.Dir) ([]ocispec.Descriptor, error) {
	ix, err := d.ReadIndex()
	if err != nil {
		return nil, err
	}
	all := make([]ocispec.Descriptor, len(ix.Entries))
	for i, e := range ix.Entries {
		if all[i], err = e.Descriptor(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Annotations that name an entry of index.json.
var nameAnnotations = []string{ocispec.AnnotationRefName, "io.containerd.image.name"}

// implied is the tag of a reference without one. It also selects the image of a layout with one image that has no name.
const implied = "latest"

// listed lists a layout's names for a message, or the digests of entries without a name.
func listed(names []ocispec.Descriptor) string {
	const most = 5
	var all []string
	for _, desc := range names[:min(most, len(names))] {
		all = append(all, fmt.Sprintf("%.200q", cmp.Or(desc.Annotations[ocispec.AnnotationRefName], string(desc.Digest))))
	}
	if more := len(names) - most; more > 0 {
		all = append(all, fmt.Sprintf("and %d more", more))
	}
	return cmp.Or(strings.Join(all, ", "), "none")
}

// Resolve returns the descriptor of a full name (docker.io/library/redis:latest), of a tag that only one name has, or
// of a digest.
func (l *Layout) Resolve(ctx context.Context, object string) (ocispec.Descriptor, error) {
	d, err := l.files()
	var desc ocispec.Descriptor
	if err == nil {
		desc, err = resolveIn(d, object)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s in %s: %w", object, l.dir, err)
	}
	return desc, nil
}

func resolveIn(d ondisk.Dir, object string) (ocispec.Descriptor, error) {
	names, err := index(d)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if dgst, ok, err := parseDigest(object); err != nil {
		return ocispec.Descriptor{}, err
	} else if ok {
		return resolveDigest(d, dgst, names)
	}
	var found []ocispec.Descriptor
	for _, full := range []bool{true, false} {
		for _, desc := range names {
			name := desc.Annotations[ocispec.AnnotationRefName]
			if full && name == object || !full && refname.IsTag(object) && strings.HasSuffix(name, ":"+object) {
				found = append(found, desc)
			}
		}
		if len(found) > 0 {
			break
		}
	}
	if len(found) == 0 && object == implied && len(names) == 1 && names[0].Annotations[ocispec.AnnotationRefName] == "" {
		found = names
	}
	for _, desc := range found[min(1, len(found)):] {
		if desc.Digest != found[0].Digest {
			return ocispec.Descriptor{}, classf(errdefs.ErrInvalidArgument, "several names have this tag: give the full name")
		}
	}
	switch {
	case len(found) > 0:
	case object == "" || strings.ContainsAny(object, " \t\n"):
		return ocispec.Descriptor{}, classf(errdefs.ErrInvalidArgument, "not a name, tag or digest")
	default:
		return ocispec.Descriptor{}, classf(errdefs.ErrNotFound, "no such name: it has %s", listed(names))
	}
	desc := found[0]
	if err := desc.Digest.Validate(); err != nil {
		return ocispec.Descriptor{}, classf(errdefs.ErrDataLoss, "%s: %w", ocispec.ImageIndexFile, err)
	}
	for _, key := range nameAnnotations {
		delete(desc.Annotations, key)
	}
	if !isIndex(desc.MediaType) && !isManifest(desc.MediaType) {
		// The entry's type may be missing or wrong, and the blob may be missing.
		if actual, err := resolveDigest(d, desc.Digest, nil); err == nil {
			desc.MediaType = typeByContent(actual.MediaType, desc.MediaType)
		} else if !errdefs.IsNotFound(err) {
			return ocispec.Descriptor{}, err
		} else {
			desc.MediaType = cmp.Or(desc.MediaType, mediaTypeOctets)
		}
	}
	return desc, nil
}

// typeByContent returns the media type of a blob. Whether it is a manifest or an index is decided by its content, not
// by the descriptor.
func typeByContent(content, declared string) string {
	if content != mediaTypeOctets || !isMediaType(declared) {
		return content
	}
	return declared
}

// manifestType returns the media type of a manifest with the given content. A declared type is used if it is that of a
// manifest or an index.
func manifestType(declared string, b []byte) string {
	if isIndex(declared) || isManifest(declared) {
		return declared
	}
	return typeByContent(sniff(b), declared)
}

// parseDigest parses a digest; ok is false for a name. Names have colons too, so the algorithm decides.
func parseDigest(s string) (d digest.Digest, ok bool, err error) {
	algorithm, _, _ := strings.Cut(s, ":")
	if !digest.Algorithm(algorithm).Available() {
		return "", false, nil
	}
	if d, err = digest.Parse(s); err != nil {
		return "", false, classf(errdefs.ErrInvalidArgument, "%w", err)
	}
	return d, true, nil
}

func resolveDigest(d ondisk.Dir, dgst digest.Digest, names []ocispec.Descriptor) (ocispec.Descriptor, error) {
	f, size, err := openBlob(d, dgst)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer f.Close()
	desc := ocispec.Descriptor{MediaType: mediaTypeOctets, Digest: dgst, Size: size}
	declared := ""
	for _, n := range names {
		if n.Digest == dgst && n.MediaType != "" {
			declared = n.MediaType
			break
		}
	}
	if isIndex(declared) || isManifest(declared) {
		desc.MediaType = declared
		return desc, nil
	}
	if size <= MaxManifest {
		b, err := io.ReadAll(io.LimitReader(f, MaxManifest))
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc.MediaType = sniff(b)
	}
	desc.MediaType = typeByContent(desc.MediaType, declared)
	return desc, nil
}

// sniff returns the media type of a manifest or an index by its content. For any other blob it is
// application/octet-stream.
func sniff(b []byte) string {
	var head struct {
		MediaType string            `json:"mediaType"`
		Manifests []json.RawMessage `json:"manifests"`
		Layers    []json.RawMessage `json:"layers"`
	}
	if !bytes.HasPrefix(bytes.TrimSpace(b), []byte("{")) || json.Unmarshal(b, &head) != nil {
		return mediaTypeOctets
	}
	switch {
	case isIndex(head.MediaType) || isManifest(head.MediaType):
		return head.MediaType
	case head.Manifests != nil:
		return ocispec.MediaTypeImageIndex
	case head.Layers != nil:
		return ocispec.MediaTypeImageManifest
	}
	return mediaTypeOctets
}

// openBlob opens a blob. NotFound if it doesn't exist.
func openBlob(d ondisk.Dir, dgst digest.Digest) (*os.File, int64, error) {
	f, err := d.OpenBlob(dgst)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, classf(errdefs.ErrNotFound, "no such blob")
	}
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// Fetch returns the content of an object that is named by a full name, tag or digest.
func (l *Layout) Fetch(ctx context.Context, id string, hintList ...string) (io.ReadCloser, error) {
	body, err := l.fetch(ctx, id, parseHints(hintList))
	if err != nil {
		return nil, fmt.Errorf("fetch %s from %s: %w", id, l.dir, err)
	}
	return namedBody{body, "fetch " + id + " from " + l.dir}, nil
}

func (l *Layout) fetch(ctx context.Context, id string, h hints) (body, error) {
	files, err := l.files()
	if err != nil {
		return nil, err
	}
	var desc ocispec.Descriptor
	d, isDigest, err := parseDigest(id)
	if !isDigest && err == nil {
		desc, err = resolveIn(files, id)
		d = desc.Digest
	}
	if err != nil {
		return nil, err
	}
	f, size, err := openBlob(files, d)
	if err != nil {
		return nil, err
	}
	if err = h.check(size); err == nil {
		_, err = f.Seek(h.offset, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	v := newVerifier(ctx, f, d, h.offset, h.offset, size)
	v.cut(h.end)
	v.mediaType = cmp.Or(desc.MediaType, h.mediaType)
	if l.unverified && size > MaxManifest { // a manifest is never so large
		v.hash = nil
	}
	return v, nil
}
