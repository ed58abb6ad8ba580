// Package remoteimage reads files of an image at a registry without pulling it. It fetches only ranges of the layers,
// which indexes of the layers tell.
package remoteimage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/inside"
	"distkit/cmd/internal/registry"
	"distkit/errclass"
	"distkit/image"
	"distkit/image/layerindex"
	"distkit/image/look"
	"distkit/layer/index"
	"distkit/layer/toc"
	"distkit/remotes"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

const (
	maxLayers = 1024 // of an image
	parallel  = 4    // indexes that are fetched at the same time
)

// Flags are the flags for images at a registry.
type Flags struct {
	options    *remotes.Options
	remote     *bool
	unverified *bool
	index      *string
}

// NewFlags registers the flags.
func NewFlags(c *cobra.Command) *Flags {
	return &Flags{
		options:    registry.Flags(c),
		remote:     c.Flags().Bool("remote", false, "read the image from the registry that its name tells, not from the store"),
		unverified: c.Flags().Bool("unverified", false, "with --remote: believe the indexes of layers that the registry has, and the tables of contents in layers"),
		index:      c.Flags().String("index", "", "with --remote: believe the indexes that the manifest `DIGEST` at the registry lists"),
	}
}

// Layers returns the layers of an image, the lowest first: of an image in the store, or with --remote of the one named
// by a reference LOCATOR[:TAG][@DIGEST]. A layer at a registry without an index is fetched completely when it is
// walked, and has an index after that.
func (f *Flags) Layers(ctx context.Context, ref string, local *inside.Flags) ([]look.Layer, error) {
	switch d := digest.Digest(*f.index); {
	case d != "" && d.Validate() != nil:
		return nil, cli.Usagef("--index: %q is not a digest", d)
	case !*f.remote && (*f.unverified || d != ""):
		return nil, cli.Usagef("--unverified and --index are for --remote")
	case !*f.remote:
		return local.Layers(ctx, ref)
	}
	name, err := remotes.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	f.options.Streams = parallel // saves memory in each
	r, err := remotes.Open(name.Locator, *f.options)
	if err != nil {
		return nil, err
	}
	img := &remoteImage{remote: r, cache: openCache(), documents: map[string]document{}}
	if err := img.resolve(ctx, name.Object, local.Platform()); err != nil {
		return nil, err
	}
	return f.layers(ctx, img)
}

func (f *Flags) layers(ctx context.Context, img *remoteImage) ([]look.Layer, error) {
	var list []look.Layer
	once := map[digest.Digest]*remoteLayer{}
	var missing []*remoteLayer
	for i, d := range img.layers {
		l := once[d.Digest]
		switch {
		case l == nil:
			l = &remoteLayer{image: img, number: i, Descriptor: d, index: img.cache.open(d)}
			once[d.Digest] = l
			if l.index == nil {
				missing = append(missing, l)
			}
		case l.Size != d.Size:
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "manifest %s has layer %s twice, of different sizes", img.manifest, d.Digest)
		}
		list = append(list, look.Layer{Layer: image.Layer{Descriptor: d}, Source: l})
	}
	return list, f.believe(ctx, img, missing)
}

// believe gives layers without an index the indexes of authors that the user trusts.
func (f *Flags) believe(ctx context.Context, img *remoteImage, missing []*remoteLayer) error {
	if len(missing) == 0 {
		return nil
	}
	found := map[digest.Digest]v1.Descriptor{}
	switch {
	case *f.index != "":
		d, err := img.document(ctx, *f.index, v1.MediaTypeImageManifest)
		if err == nil {
			found, err = layerindex.Parse(d.content)
		}
		if err != nil {
			return fmt.Errorf("indexes %s: %w", *f.index, err)
		}
	case *f.unverified:
		for d, err := range img.remote.Referrers(ctx, img.manifest, remotes.ReferrerFilter{ArtifactType: index.MediaType}) {
			var doc document
			if err == nil {
				doc, err = img.document(ctx, string(d.Digest), v1.MediaTypeImageManifest)
			}
			if err == nil {
				found, err = layerindex.Parse(doc.content)
			}
			if err != nil {
				return err
			}
			break
		}
	}
	room := int64(maxIndexes)
	for _, l := range missing {
		if d, ok := found[l.Digest]; ok {
			if d.Digest.Validate() != nil || d.Size < 0 {
				return errclass.Errorf(errdefs.ErrDataLoss, "the descriptor of the index of layer %s is malformed", l.Digest)
			}
			if d.Size > room {
				return errclass.Errorf(errdefs.ErrDataLoss, "the indexes of the layers have more than %d bytes together", maxIndexes)
			}
			room -= d.Size
		}
	}
	errs, turn := make([]error, len(missing)), make(chan struct{}, parallel)
	var all sync.WaitGroup
	var tables toc.Budget
	for i, l := range missing {
		d, ok := found[l.Digest]
		if !ok && !*f.unverified {
			continue
		}
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			if ok {
				l.index, errs[i] = img.fetchIndex(ctx, d, l.Descriptor)
				return
			}
			if l.toc, errs[i] = toc.Find(ctx, l.Descriptor, l.bytes, &tables, unnamed); errs[i] != nil {
				errs[i] = fmt.Errorf("layer %s: %w", l.Digest, errs[i])
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// remoteImage is an image at a remote. It keeps the documents that were fetched.
type remoteImage struct {
	remote    remotes.Remote
	cache     *cache
	documents map[string]document

	manifest digest.Digest
	layers   []v1.Descriptor
	config   v1.Descriptor
	diffIDs  func() []digest.Digest
}

// A document is a manifest, index or config.
type document struct {
	v1.Descriptor
	content []byte
}

// document fetches a document. mediaType is "" for one named by a tag: a hint would make the registry convert it.
func (m *remoteImage) document(ctx context.Context, object, mediaType string) (document, error) {
	if d, ok := m.documents[object]; ok {
		return d, nil
	}
	r, err := m.remote.Fetch(ctx, object, "mediatype:"+mediaType)
	if err != nil {
		return document{}, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, remotes.MaxManifest+1))
	if err == nil && len(b) > remotes.MaxManifest {
		err = errclass.Errorf(errdefs.ErrDataLoss, "%s is larger than a manifest may be", object)
	}
	if err != nil {
		return document{}, err
	}
	dgst := digest.FromBytes(b)
	if d := digest.Digest(object); d.Validate() == nil {
		dgst = d // it was verified
	}
	kind, ok := image.TypeOf(b)
	if !ok {
		kind = image.Octets
	}
	d := document{v1.Descriptor{MediaType: kind, Digest: dgst, Size: int64(len(b))}, b}
	m.documents[object], m.documents[string(dgst)] = d, d
	return d, nil
}

// known is the remote of an image, which is asked for each document only once.
type known struct {
	remotes.Remote
	image *remoteImage
}

func (k known) Resolve(ctx context.Context, object string) (v1.Descriptor, error) {
	d, err := k.image.document(ctx, object, "")
	return d.Descriptor, err
}

func (k known) Fetch(ctx context.Context, id string, hints ...string) (io.ReadCloser, error) {
	mediaType := v1.MediaTypeImageManifest
	for _, h := range hints {
		if t, ok := strings.CutPrefix(h, "mediatype:"); ok {
			mediaType = t
		}
	}
	d, err := k.image.document(ctx, id, mediaType)
	return io.NopCloser(bytes.NewReader(d.content)), err
}

// resolve finds the manifest for a platform, and reads it.
func (m *remoteImage) resolve(ctx context.Context, object, platform string) error {
	d, err := m.document(ctx, object, "")
	if err != nil {
		return err
	}
	if image.IsIndex(d.MediaType) || platform != "" {
		if platform == "" {
			platform = "local"
		}
		chosen, err := remotes.ResolvePlatform(ctx, known{m.remote, m}, object, platform)
		if err != nil {
			return err
		}
		if d, err = m.document(ctx, string(chosen.Digest), chosen.MediaType); err != nil {
			return err
		}
	}
	if !image.IsManifest(d.MediaType) {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "%s is not an image but %s", object, d.MediaType)
	}
	var doc struct {
		Config v1.Descriptor     `json:"config"`
		Layers image.Descriptors `json:"layers"`
	}
	if err := image.Decode(d.content, &doc); err != nil {
		return fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if len(doc.Layers) > maxLayers {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "manifest %s has more than %d layers", d.Digest, maxLayers)
	}
	for i, l := range doc.Layers {
		if l.Digest.Validate() != nil || l.Size < 0 {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "manifest %s: the descriptor of layer %d is malformed", d.Digest, i+1)
		}
	}
	m.manifest, m.layers, m.config = d.Digest, doc.Layers, doc.Config
	m.diffIDs = sync.OnceValue(func() []digest.Digest {
		c, err := m.document(ctx, string(m.config.Digest), m.config.MediaType)
		if err != nil {
			return nil
		}
		ids, _ := image.DiffIDs(c.content)
		return ids
	})
	return nil
}

// diffID returns the diff ID of a layer, or "" if it is not known.
func (m *remoteImage) diffID(number int) digest.Digest {
	if ids := m.diffIDs(); len(ids) == len(m.layers) && ids[number].Validate() == nil {
		return ids[number]
	}
	return ""
}

// maxIndexes bounds the indexes of an image that are fetched, in bytes.
const maxIndexes = 256 << 20

// fetchIndex fetches the index of a layer into a temporary file.
func (m *remoteImage) fetchIndex(ctx context.Context, d, layer v1.Descriptor) (*index.Index, error) {
	r, err := m.remote.Fetch(ctx, string(d.Digest), "mediatype:"+d.MediaType, fmt.Sprintf("size:%d", d.Size))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	f, err := unnamed()
	if err != nil {
		return nil, err
	}
	var x *index.Index
	n, err := io.Copy(f, io.LimitReader(r, d.Size+1))
	if err == nil && n != d.Size {
		err = errclass.Errorf(errdefs.ErrDataLoss, "its size is not %d", d.Size)
	}
	if err == nil {
		x, err = openIndex(f, n, layer)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("index %s: %w", d.Digest, err)
	}
	return x, nil
}
