package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layout is a directory in the form of an OCI image layout, such as the store's: its names
// are those of index.json, and objects are named in full, by tag or by digest.
type Layout struct{ dir string }

// check tells whether the directory is one that can be read.
func (l *Layout) check() error {
	b, err := l.readFile(ocispec.ImageLayoutFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// A store that is not quite there yet, or none: blobs tell.
		if _, err := os.Stat(filepath.Join(l.dir, ocispec.ImageBlobsDir)); err != nil {
			return classf(errdefs.ErrNotFound, "not an OCI image layout: %w", cause(err))
		}
		return nil
	case err != nil:
		return err
	}
	var v ocispec.ImageLayout
	if err := json.Unmarshal(b, &v); err != nil {
		return classf(errdefs.ErrDataLoss, "%s: %w", ocispec.ImageLayoutFile, err)
	}
	if v.Version != ocispec.ImageLayoutVersion {
		return classf(errdefs.ErrNotImplemented, "layout version %q is not known", printable(v.Version))
	}
	return nil
}

func cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// open opens what must be a regular file, whatever else a directory may hold.
func (l *Layout) open(name string) (*os.File, int64, error) {
	file := filepath.Join(l.dir, name)
	info, err := os.Stat(file)
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return nil, 0, classf(errdefs.ErrDataLoss, "%s is not a regular file", file)
	}
	f, err := os.Open(file)
	return f, info.Size(), err
}

// readFile reads a small file whole.
func (l *Layout) readFile(name string) ([]byte, error) {
	f, size, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > MaxManifest {
		return nil, classf(errdefs.ErrDataLoss, "%s is larger than %s", name, sizeString(MaxManifest))
	}
	return io.ReadAll(io.LimitReader(f, MaxManifest+1))
}

func blobFile(d digest.Digest) string {
	return filepath.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// index lists the names; a layout without any has no file.
func (l *Layout) index() ([]ocispec.Descriptor, error) {
	b, err := l.readFile(ocispec.ImageIndexFile)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return nil, classf(errdefs.ErrDataLoss, "%s: %w", ocispec.ImageIndexFile, err)
	}
	return index.Manifests, nil
}

// Annotations of index.json that say how an entry is named there.
var nameAnnotations = []string{ocispec.AnnotationRefName, "io.containerd.image.name"}

// Resolve gives the descriptor of a full name (docker.io/library/redis:latest), of a tag
// that one name has, or of a digest.
func (l *Layout) Resolve(ctx context.Context, object string) (ocispec.Descriptor, error) {
	desc, err := ocispec.Descriptor{}, l.check()
	if err == nil {
		desc, err = l.resolve(object)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s in %s: %w", object, l.dir, err)
	}
	return desc, nil
}

func (l *Layout) resolve(object string) (ocispec.Descriptor, error) {
	names, err := l.index()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if d, ok, err := parseDigest(object); err != nil {
		return ocispec.Descriptor{}, err
	} else if ok {
		return l.resolveDigest(d, names)
	}
	var found []ocispec.Descriptor
	for _, full := range []bool{true, false} {
		for _, desc := range names {
			name := desc.Annotations[ocispec.AnnotationRefName]
			if full && name == object || !full && isTag(object) && strings.HasSuffix(name, ":"+object) {
				found = append(found, desc)
			}
		}
		if len(found) > 0 {
			break
		}
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
		return ocispec.Descriptor{}, classf(errdefs.ErrNotFound, "no such name")
	}
	desc := found[0]
	if err := desc.Digest.Validate(); err != nil {
		return ocispec.Descriptor{}, classf(errdefs.ErrDataLoss, "%s: %w", ocispec.ImageIndexFile, err)
	}
	for _, key := range nameAnnotations {
		delete(desc.Annotations, key)
	}
	return desc, nil
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

func (l *Layout) resolveDigest(d digest.Digest, names []ocispec.Descriptor) (ocispec.Descriptor, error) {
	f, size, err := l.open(blobFile(d))
	if err != nil {
		return ocispec.Descriptor{}, notFound(err)
	}
	defer f.Close()
	desc := ocispec.Descriptor{MediaType: mediaTypeOctets, Digest: d, Size: size}
	for _, n := range names {
		if n.Digest == d {
			desc.MediaType = n.MediaType
			return desc, nil
		}
	}
	if size <= MaxManifest {
		b, err := io.ReadAll(io.LimitReader(f, MaxManifest))
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		desc.MediaType = sniff(b)
	}
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

func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return classf(errdefs.ErrNotFound, "no such blob")
	}
	return err
}

// Fetch gives the bytes of what a name, tag or digest stands for.
func (l *Layout) Fetch(ctx context.Context, id string, hintList ...string) (io.ReadCloser, error) {
	body, err := l.fetch(ctx, id, parseHints(hintList))
	if err != nil {
		return nil, fmt.Errorf("fetch %s from %s: %w", id, l.dir, err)
	}
	return named{body, "fetch " + id + " from " + l.dir}, nil
}

func (l *Layout) fetch(ctx context.Context, id string, h hints) (body, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	d, isDigest, err := parseDigest(id)
	if !isDigest && err == nil {
		var desc ocispec.Descriptor
		desc, err = l.resolve(id)
		d = desc.Digest
	}
	if err != nil {
		return nil, err
	}
	f, size, err := l.open(blobFile(d))
	if err != nil {
		return nil, notFound(err)
	}
	if err = h.check(size); err == nil {
		_, err = f.Seek(h.offset, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return newVerifier(ctx, f, d, h.offset, h.offset, size), nil
}
