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

// Layout is a directory in the form of an OCI image layout, such as the store's: its names
// are those of index.json, and objects are named in full, by tag or by digest.
type Layout struct {
	dir                  string
	ifAbsent, unverified bool // see Options
}

// files selects the layout's files, and checks that they are of one that can be read. NotFound if there is none.
func (l *Layout) files() (ondisk.Dir, error) {
	d, err := ondisk.Open(l.dir)
	if err != nil {
		return d, err
	}
	err = d.Check()
	if !errors.Is(err, fs.ErrNotExist) {
		return d, err
	}
	// A store that is not quite there yet, or none: blobs tell.
	if _, err := d.Tree.Stat(ocispec.ImageBlobsDir); err != nil {
		return d, classf(errdefs.ErrNotFound, "not an OCI image layout: %w", disk.Cause(err))
	}
	return d, nil
}

// index lists the names.
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

// Annotations of index.json that say how an entry is named there.
var nameAnnotations = []string{ocispec.AnnotationRefName, "io.containerd.image.name"}

// implied is the tag of a reference without one. A layout whose one image has no name has it under this tag.
const implied = "latest"

// listed tells in a message what a layout has: names, and digests of what has no name.
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

// Resolve gives the descriptor of a full name (docker.io/library/redis:latest), of a tag
// that one name has, or of a digest.
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
		// The entry need not say the type, or the right one, and the blob need not be here.
		if is, err := resolveDigest(d, desc.Digest, nil); err == nil {
			desc.MediaType = typeByContent(is.MediaType, desc.MediaType)
		} else if !errdefs.IsNotFound(err) {
			return ocispec.Descriptor{}, err
		} else {
			desc.MediaType = cmp.Or(desc.MediaType, mediaTypeOctets)
		}
	}
	return desc, nil
}

// typeByContent returns the media type of a blob: the content decides whether it is a manifest or an index, whatever its
// descriptor says.
func typeByContent(content, said string) string {
	if content != mediaTypeOctets || !isMediaType(said) {
		return content
	}
	return said
}

// manifestType returns the media type of a manifest that is said to have one. Only a type of manifests is believed.
func manifestType(said string, b []byte) string {
	if isIndex(said) || isManifest(said) {
		return said
	}
	return typeByContent(sniff(b), said)
}

// parseDigest tells digests from names, which have colons too, by the algorithm.
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
	said := ""
	for _, n := range names {
		if n.Digest == dgst && n.MediaType != "" {
			said = n.MediaType
			break
		}
	}
	if isIndex(said) || isManifest(said) {
		desc.MediaType = said
		return desc, nil
	}
	if size <= MaxManifest {
		b, err := io.ReadAll(io.LimitReader(f, MaxManifest))
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc.MediaType = sniff(b)
	}
	desc.MediaType = typeByContent(desc.MediaType, said)
	return desc, nil
}

// sniff tells the media type of a manifest by its content: that of any other blob is octets.
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

// openBlob opens a blob. NotFound if there is none.
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

// Fetch gives the bytes of what a name, tag or digest stands for.
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
	if l.unverified && size > MaxManifest { // no manifest is that large
		v.hash = nil
	}
	return v, nil
}
