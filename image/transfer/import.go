package transfer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportOptions select which images of an archive get names, and which names.
type ImportOptions struct {
	Select   Selection
	Platform *image.Platform // used with One

	// Only selects images: by a name or tag in the archive, or by the digest of the target. Empty selects all.
	Only []string
	// Name is the name for the one image, whatever its name in the archive.
	Name string
	// BaseName is prefixed to the tag of an image that has only a tag in the archive, or to the digest of one without
	// any name.
	BaseName string
	// Referrers says to import referrers too: entries without a name that refer to an imported image or a part of it.
	// ArtifactTypes selects some of them; none means all. Ignored, if set, is called with the number of entries whose
	// subject isn't imported.
	Referrers     bool
	ArtifactTypes []string
	Ignored       func(n int)
	// Gate, if set, is called with the images before they get their names. If it fails, none gets one.
	Gate func(context.Context, []image.Image) error
}

// found is an image of an archive with one of its names.
type found struct {
	target v1.Descriptor // with labels as annotations
	name   string        // "" if it has none
	tag    string        // a name that is only a tag
}

// Import stores the blobs of an archive, and then names its images as containerd and docker do: by the annotations
// io.containerd.image.name and org.opencontainers.image.ref.name in index.json; or by the RepoTags in manifest.json,
// normalised, if the archive is not an OCI layout. manifest.json is also used if the layout has no images, or one that
// can't be unpacked: docker writes such archives. An existing name is moved to the new image. Import returns the named
// images, in the archive's order.
//
// All images are named in one change, or none is; a failed import leaves only blobs without a name.
//
// DataLoss: the archive is truncated or damaged, a blob is missing or doesn't hash to its name, or a layer doesn't hash
// to its diff ID. InvalidArgument: not an image archive, an entry that no image archive has, or an image without a
// name. NotFound: nothing for the platform, or a selected image is missing. FailedPrecondition: an image layout of an
// unknown version. NotImplemented: an unsupported compression.
func Import(ctx context.Context, store *content.Store, names *image.Names, from Source, o ImportOptions) ([]image.Image, error) {
	a, err := readArchive(ctx, store, from)
	if err != nil {
		return nil, err
	}
	images, err := o.images(ctx, store, a)
	if err == nil {
		err = ctx.Err()
	}
	if err == nil && o.Referrers {
		err = o.addReferrers(ctx, store, names, a, images)
	}
	if err == nil && o.Gate != nil {
		err = o.Gate(ctx, images)
	}
	if err != nil {
		return nil, err
	}
	return images, names.ReplaceAll(ctx, images)
}

// List returns the images of an archive that Import would find, and stores nothing. An image without a name has none
// here either; one with only a tag has the tag as its name.
func List(ctx context.Context, from Source, o ImportOptions) ([]image.Image, error) {
	a, err := readArchive(ctx, nil, from)
	if err != nil {
		return nil, err
	}
	all, err := a.layoutImages()
	if err == nil && len(all) == 0 && a.docker != nil {
		all, err = a.dockerImages(ctx, nil, o)
	}
	if err == nil {
		all, err = o.choose(all)
	}
	if err != nil {
		return nil, err
	}
	images := make([]image.Image, len(all))
	for i, f := range all {
		images[i] = image.Image{Name: cmp.Or(f.name, f.tag), Target: f.target, Labels: f.target.Annotations}
		images[i].Target.Annotations = nil
	}
	return images, nil
}

// images returns the selected images of an archive, verified, with their final names.
func (o ImportOptions) images(ctx context.Context, store *content.Store, a *archive) ([]image.Image, error) {
	all, err := a.layoutImages()
	if err != nil {
		return nil, err
	}
	var images []image.Image
	cannotUnpack := unpackable{}
	if o.Referrers {
		if all, err = a.setReferrers(ctx, store, all); err != nil {
			return nil, err
		}
	}
	if len(all) > 0 {
		if images, err = o.verified(ctx, store, a, all); a.docker == nil || !errors.As(err, &cannotUnpack) {
			return images, err
		}
	}
	if a.docker != nil {
		all, err := a.dockerImages(ctx, store, o)
		if err == nil {
			images, err = o.verified(ctx, store, a, all)
		}
		if err != nil {
			return nil, err
		}
	}
	if len(images) == 0 && o.Name != "" {
		return nil, absent("archive has no image for the name %s", o.Name)
	}
	return images, nil
}

func (o ImportOptions) verified(ctx context.Context, store *content.Store, a *archive, all []found) ([]image.Image, error) {
	all, err := o.choose(all)
	if err != nil {
		return nil, err
	}
	images, err := o.name(all)
	if err != nil {
		return nil, err
	}
	targets := map[digest.Digest]v1.Descriptor{}
	for i, img := range images {
		target, ok := targets[img.Target.Digest]
		if !ok {
			if target, err = o.verify(ctx, store, a, img.Target); err != nil {
				return nil, err
			}
			targets[img.Target.Digest] = target
		}
		images[i].Target = target
	}
	return images, nil
}

// maybe reports whether an image with that name, whose digest is still unknown, may be selected.
func (o ImportOptions) maybe(name string) bool {
	byDigest := slices.ContainsFunc(o.Only, func(only string) bool { return digest.Digest(only).Validate() == nil })
	return len(o.Only) == 0 || byDigest || slices.ContainsFunc(o.Only, func(only string) bool { return sameName(only, name) })
}

// choose returns the selected images. NotFound: the archive lacks one.
func (o ImportOptions) choose(all []found) ([]found, error) {
	if len(o.Only) == 0 {
		return all, nil
	}
	wanted := make([]bool, len(all))
	for _, only := range o.Only {
		any := false
		for i, f := range all {
			if f.tag == only || string(f.target.Digest) == only || f.name != "" && sameName(only, f.name) {
				any, wanted[i] = true, true
			}
		}
		if !any {
			return nil, absent("archive has no image %.200q; it has %d, which --list shows", only, len(all))
		}
	}
	var chosen []found
	for i, f := range all {
		if wanted[i] {
			chosen = append(chosen, f)
		}
	}
	return chosen, nil
}

// layoutImages returns the entries of an archive's index.json; none if the archive isn't a layout.
func (a *archive) layoutImages() ([]found, error) {
	switch {
	case a.layout != nil:
	case a.docker != nil:
		return nil, nil
	default:
		return nil, invalid("not an image archive: it has neither %s nor %s", v1.ImageLayoutFile, dockerManifestsFile)
	}
	var layout v1.ImageLayout
	if err := image.Decode(a.layout, &layout); err != nil {
		return nil, invalid("%s: %w", v1.ImageLayoutFile, err)
	}
	if layout.Version != v1.ImageLayoutVersion {
		return nil, unknownVersion(layout.Version)
	}
	if a.index == nil {
		return nil, damaged("archive has no %s", v1.ImageIndexFile)
	}
	var index struct {
		Manifests entries `json:"manifests"`
	}
	if err := image.Decode(a.index, &index); err != nil {
		return nil, errclass.As(fmt.Errorf("%s: %w", v1.ImageIndexFile, err), errdefs.ErrInvalidArgument)
	}
	a.index = nil // free it: it may be large
	return index.Manifests, nil
}

// entries decodes the entries of an index.json one after another.
type entries []found

// UnmarshalJSON implements json.Unmarshaler.
func (all *entries) UnmarshalJSON(b []byte) error {
	*all = nil
	return image.EachDescriptor(b, func(d v1.Descriptor) error {
		f := found{target: d, name: d.Annotations[AnnotationImageName]}
		if ref := d.Annotations[v1.AnnotationRefName]; f.name == "" && isTag(ref) {
			f.tag = ref
		} else if f.name == "" {
			f.name = ref
		}
		f.target.Annotations = labels(d.Annotations)
		*all = append(*all, f)
		if err := content.Validate(d.Digest); !errdefs.IsNotImplemented(err) { // an unsupported algorithm concerns that image only
			return err
		}
		return nil
	})
}

// labels returns the annotations of an entry except names and times.
func labels(annotations map[string]string) map[string]string {
	var kept map[string]string // allocated only if needed: most entries have none
	for k, v := range annotations {
		if k == AnnotationImageName || layout.Reserved(k) {
			continue
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[k] = v
	}
	return kept
}

// name gives the images of an archive their names.
func (o ImportOptions) name(all []found) ([]image.Image, error) {
	if len(all) == 0 {
		return nil, nil
	}
	named := map[digest.Digest]bool{}
	for _, f := range all {
		if f.name != "" || f.tag != "" {
			named[f.target.Digest] = true
		}
	}
	// If some images have names, the entries without one are parts of those, or refer to them.
	var images []image.Image
	positions := map[string]int{}
	for _, f := range all {
		if len(named) > 0 && f.name == "" && f.tag == "" {
			continue
		}
		name := f.name
		switch {
		case o.Name != "":
			name = o.Name
		case name != "":
		case o.BaseName != "" && f.tag != "":
			name = o.BaseName + ":" + f.tag
		case o.BaseName != "":
			name = o.BaseName + "@" + f.target.Digest.String()
		case f.tag != "":
			return nil, invalid("image %s has only the tag %q for a name: give --base-name or --name", f.target.Digest, f.tag)
		default:
			return nil, invalid("image %s has no name in the archive: give --name or --base-name", f.target.Digest)
		}
		i, twice := positions[name]
		switch {
		case !twice:
			positions[name] = len(images)
			images = append(images, image.Image{Name: name, Target: f.target, Labels: f.target.Annotations})
		case images[i].Target.Digest == f.target.Digest:
		case o.Name != "":
			return nil, invalid("archive has more than one image: %s can't be the name of all", name)
		default:
			return nil, invalid("archive has two images of the name %s: %s and %s", name, images[i].Target.Digest, f.target.Digest)
		}
	}
	return images, nil
}

// verify checks that the store has everything of an image, and returns the target for its name.
func (o ImportOptions) verify(ctx context.Context, store *content.Store, a *archive, d v1.Descriptor) (v1.Descriptor, error) {
	target := d
	target.Annotations = nil
	if _, err := store.Size(d.Digest); errdefs.IsNotFound(err) {
		return d, damaged("image %s is not in the archive", d.Digest)
	} else if err != nil {
		return d, err
	}
	if o.Select == One {
		// Other platforms of the index don't matter here, even if they are wrong.
		m, err := image.Walker{Store: store, Platform: o.Platform}.Manifest(ctx, d)
		if err != nil {
			return d, err
		}
		target = m
		target.Annotations = nil
	}
	t, err := survey(ctx, store, target)
	if err != nil {
		return d, err
	}
	for _, g := range t.gaps {
		// Manifests of an index may be missing for platforms that weren't archived. A manifest that came with its
		// config was meant to be complete, except an attestation.
		wasIncluded := a.blobs[g.manifest.Digest] && a.blobs[g.config] && !attached(g.manifest)
		if o.Select != Available && o.Select != Sparse || t.images == 0 || wasIncluded {
			return d, damaged("image %s is incomplete: %s is not in the archive", d.Digest, g.missing.Digest)
		}
	}
	for _, m := range t.manifests {
		if err := checkLayers(ctx, store, m); err != nil {
			return d, err
		}
	}
	return target, nil
}

// unpackable is the error of an image that is complete, but can't be unpacked.
type unpackable struct{ error }

func (u unpackable) Unwrap() error { return u.error }

// checkLayers compares the number of layers with the number of diff IDs in the config. A config without a rootfs is an
// artifact's, whatever its type.
func checkLayers(ctx context.Context, store *content.Store, m image.Node) error {
	if !image.IsManifest(m.Type) {
		return nil
	}
	b, err := image.Walker{Store: store}.Config(ctx, m.Descriptor)
	if errdefs.IsInvalidArgument(err) {
		return nil // too large for a config
	}
	if err != nil {
		return err
	}
	diffIDs, err := image.DiffIDs(b)
	if layers := len(m.Children) - 1; err == nil && diffIDs != nil && len(diffIDs) != layers {
		return unpackable{damaged("image %s can't be unpacked: it has %d layers, its config %d diff IDs", m.Digest, layers, len(diffIDs))}
	}
	return nil
}
