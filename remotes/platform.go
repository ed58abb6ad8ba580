package remotes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds for the search of an index.
const (
	maxIndexDepth = 4  // nesting of indexes
	maxWalk       = 32 // number of indexes, manifests and configs read
	maxPlatforms  = 20 // number of platforms listed in an error
)

// ResolvePlatform resolves an object to the manifest for a platform, in the syntax of containerd/platforms
// (linux/arm64, linux/arm/v7, windows), or "local" for Linux on this machine's architecture. From an index it selects
// the best match in containerd's order: amd64 runs 386, arm/v7 runs arm/v6. The config of a single manifest must match,
// unless it has no platform at all, as an artifact. The result's Platform is set if there is one. If nothing matches
// the error is NotFound, and lists the platforms that exist.
func ResolvePlatform(ctx context.Context, r Remote, object, platform string) (ocispec.Descriptor, error) {
	p, err := parsePlatform(platform)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc, err := r.Resolve(ctx, object)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc.Size = -1 // the registry's statement may be wrong
	w := walk{ctx: ctx, fetcher: r, match: platforms.Only(p), left: maxWalk}
	if err := w.visit(desc, 0); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s for %s: %w", object, platforms.Format(p), err)
	}
	if len(w.found) == 0 && w.unsupported != "" {
		return ocispec.Descriptor{}, classf(errdefs.ErrNotImplemented, "resolve %s: the manifest for %s has a digest of an algorithm that is not supported: %s",
			object, platforms.Format(p), w.unsupported)
	}
	if len(w.found) == 0 {
		list := "none"
		if len(w.others) > 0 {
			list = strings.Join(w.others, ", ")
		}
		return ocispec.Descriptor{}, classf(errdefs.ErrNotFound, "resolve %s: no manifest for %s: there is %s", object, platforms.Format(p), list)
	}
	slices.SortStableFunc(w.found, func(a, b ocispec.Descriptor) int {
		switch {
		case w.match.Less(*a.Platform, *b.Platform):
			return -1
		case w.match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return w.found[0], nil
}

func parsePlatform(s string) (ocispec.Platform, error) {
	if s == "local" {
		p := platforms.DefaultSpec()
		p.OS = "linux" // images are for Linux, whatever system this is
		return p, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return p, classf(errdefs.ErrInvalidArgument, "platform %q: write OS/ARCH or OS/ARCH/VARIANT, as linux/amd64, or local", s)
	}
	return p, nil
}

// walk collects the manifests that match a platform.
type walk struct {
	ctx     context.Context
	fetcher Fetcher
	match   platforms.MatchComparer
	left    int
	found   []ocispec.Descriptor
	others  []string // platforms that don't match
	// unsupported is a digest with an unsupported algorithm, of a manifest that may match.
	unsupported string
}

func (w *walk) visit(desc ocispec.Descriptor, depth int) error {
	switch {
	case isIndex(desc.MediaType):
		return w.index(desc, depth)
	case isManifest(desc.MediaType):
		return w.manifest(desc, depth == 0)
	case depth == 0:
		return classf(errdefs.ErrNotFound, "%s is not a manifest but %s", desc.Digest, printable(desc.MediaType))
	}
	return nil
}

func (w *walk) index(desc ocispec.Descriptor, depth int) error {
	if depth > maxIndexDepth {
		return classf(errdefs.ErrDataLoss, "indexes are nested more than %d deep", maxIndexDepth)
	}
	var index ocispec.Index
	if err := w.read(&desc, &index); err != nil {
		return err
	}
	for _, m := range index.Manifests {
		err := m.Digest.Validate()
		switch {
		case errors.Is(err, digest.ErrDigestUnsupported):
			if m.Platform == nil || w.match.Match(*m.Platform) {
				w.unsupported = printable(m.Digest.String())
			} else {
				w.other(*m.Platform)
			}
		case err != nil || m.Size < 0:
			return classf(errdefs.ErrDataLoss, "index %s has an entry without digest or size", desc.Digest)
		case m.Platform == nil || isIndex(m.MediaType):
			if err := w.visit(m, depth+1); err != nil {
				return err
			}
		case w.match.Match(*m.Platform):
			w.found = append(w.found, m)
		default:
			w.other(*m.Platform)
		}
	}
	return nil
}

// manifest checks the platform in a manifest's config, because the index states none. A manifest without any platform
// is accepted only if it is alone.
func (w *walk) manifest(desc ocispec.Descriptor, alone bool) error {
	var manifest ocispec.Manifest
	if err := w.read(&desc, &manifest); err != nil {
		return err
	}
	switch manifest.Config.MediaType {
	case ocispec.MediaTypeImageConfig, "application/vnd.docker.container.image.v1+json":
	default: // an artifact
		if alone {
			w.found = append(w.found, desc)
		}
		return nil
	}
	if manifest.Config.Digest.Validate() != nil {
		return classf(errdefs.ErrDataLoss, "manifest %s has no digest of its config", desc.Digest)
	}
	var p ocispec.Platform
	if manifest.Config.Size < 0 {
		return classf(errdefs.ErrDataLoss, "manifest %s has no size of its config", desc.Digest)
	}
	if err := w.read(&manifest.Config, &p); err != nil {
		return err
	}
	switch {
	case w.match.Match(p):
		desc.Platform = &p
	case !alone || p.OS != "" || p.Architecture != "":
		w.other(p)
		return nil
	}
	w.found = append(w.found, desc)
	return nil
}

func (w *walk) other(p ocispec.Platform) {
	s := printable(platforms.Format(platforms.Normalize(p)))
	if p.OS == "unknown" || p.OS == "" && p.Architecture == "" || slices.Contains(w.others, s) || len(w.others) > maxPlatforms {
		return
	}
	if len(w.others) == maxPlatforms {
		s = "…"
	}
	w.others = append(w.others, s)
}

// read fetches and decodes a small object, and sets its size if that was unknown.
func (w *walk) read(desc *ocispec.Descriptor, v any) error {
	if w.left--; w.left < 0 {
		return classf(errdefs.ErrNotImplemented, "more than %d indexes, manifests and configs to read: name the digest of one", maxWalk)
	}
	if desc.Size > MaxManifest {
		return classf(errdefs.ErrDataLoss, "%s is larger than a manifest may be (%s)", desc.Digest, sizeString(MaxManifest))
	}
	hints := []string{"mediatype:" + desc.MediaType}
	if desc.Size >= 0 {
		hints = append(hints, fmt.Sprintf("size:%d", desc.Size))
	}
	rc, err := w.fetcher.Fetch(w.ctx, desc.Digest.String(), hints...)
	if err != nil {
		return err
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, MaxManifest+1))
	if err != nil {
		return err
	}
	desc.Size = int64(len(b))
	if err := decode(b, v); err != nil {
		return classf(errdefs.ErrDataLoss, "%s: %s", desc.Digest, printable(err.Error()))
	}
	return nil
}
