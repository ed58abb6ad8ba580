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

// ImportOptions tell which images of an archive are named, and how.
type ImportOptions struct {
	Select   Selection
	Platform *image.Platform // for One

	// Only are the images that are wanted: a name or tag that the archive gives, or the digest of what is named. Empty
	// for all.
	Only []string
	// Name is the name of the one image, whatever the archive calls it.
	Name string
	// BaseName precedes the tag of an image that the archive gives a tag alone, or the digest
	// of one that it gives no name at all.
	BaseName string
	// Referrers are taken, too: those entries without a name that refer to an image that is named, or to what it consists of, of these
	// artifact types, or of all if there are none. Ignored, if set, is called with the number of those that refer to nothing that is taken.
	Referrers     bool
	ArtifactTypes []string
	Ignored       func(n int)
	// Gate, if set, is called with the images before they are named. If it fails, none of them is.
	Gate func(context.Context, []image.Image) error
}

// found is an image of an archive with one of its names.
type found struct {
	target v1.Descriptor // its annotations are labels
	name   string        // "" where there is none
	tag    string        // a name that is a tag alone
}

// Import stores the blobs of an archive, then names its images, as containerd and docker do: by the annotations
// io.containerd.image.name and org.opencontainers.image.ref.name of its index.json; in an archive that is no OCI
// layout, by the RepoTags of its manifest.json, normalised. So it is too where the layout has no images, or one that
// can't be unpacked: docker writes such archives, with a manifest.json that is right. A name that is there points at
// the new image from then on. It returns what was named, in the archive's order.
//
// All images are named in one change, or none is: what a failed import brought are blobs without a name. DataLoss: the
// archive is truncated or damaged, a blob does not hash to its name, a layer not to its diff ID, or one is missing.
// InvalidArgument: it is no image archive, has an entry that no image archive has, or an image without a name.
// NotFound: it has nothing for the platform, or no image that is wanted. FailedPrecondition: an image layout of an
// unknown version. NotImplemented: a compression that isn't known here.
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

// List returns the images of an archive, as Import would find them, and stores nothing. One without a name has none
// here too; one that has a tag alone has the tag for a name.
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

// images are the images of an archive that are wanted, verified, with the names that they are to have.
func (o ImportOptions) images(ctx context.Context, store *content.Store, a *archive) ([]image.Image, error) {
	all, err := a.layoutImages()
	if err != nil {
		return nil, err
	}
	var images []image.Image
	odd := unpackable{}
	if o.Referrers {
		if all, err = a.setReferrers(ctx, store, all); err != nil {
			return nil, err
		}
	}
	if len(all) > 0 {
		if images, err = o.verified(ctx, store, a, all); a.docker == nil || !errors.As(err, &odd) {
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
		return nil, absent("archive has no image that %s could name", o.Name)
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

// maybe reports whether an image of that name, or of what digest it may turn out to have, may be wanted.
func (o ImportOptions) maybe(name string) bool {
	digests := slices.ContainsFunc(o.Only, func(only string) bool { return digest.Digest(only).Validate() == nil })
	return len(o.Only) == 0 || digests || slices.ContainsFunc(o.Only, func(only string) bool { return sameName(only, name) })
}

// choose returns the images that are wanted. NotFound: the archive does not have one.
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

// layoutImages are the entries of an archive's index.json: none of an archive that is no layout.
func (a *archive) layoutImages() ([]found, error) {
	switch {
	case a.layout != nil:
	case a.docker != nil:
		return nil, nil
	default:
		return nil, invalid("no image archive: it has neither %s nor %s", v1.ImageLayoutFile, dockerManifestsFile)
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
	a.index = nil // it may be large
	return index.Manifests, nil
}

// entries decodes those of an index.json, one after the other.
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
		if err := content.Validate(d.Digest); !errdefs.IsNotImplemented(err) { // which concerns that image alone
			return err
		}
		return nil
	})
}

// labels are the annotations of an entry that are no names and no times of ours.
func labels(annotations map[string]string) map[string]string {
	var kept map[string]string // most entries have none: one for each would take memory
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
	// Beside images with names, those without are what the former refer to, or refers to them.
	var images []image.Image
	at := map[string]int{}
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
		i, twice := at[name]
		switch {
		case !twice:
			at[name] = len(images)
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

// verify finds out whether all of an image is in the store, and returns what its name is to
// point at.
func (o ImportOptions) verify(ctx context.Context, store *content.Store, a *archive, d v1.Descriptor) (v1.Descriptor, error) {
	target := d
	target.Annotations = nil
	if _, err := store.Size(d.Digest); errdefs.IsNotFound(err) {
		return d, damaged("image %s is not in the archive", d.Digest)
	} else if err != nil {
		return d, err
	}
	if o.Select == One {
		// An index whose other platforms lie is none of our business; this one's may not.
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
		// Of an index, manifests may be missing for platforms that nobody put in; what came
		// with its config was meant to be whole, but for attestations.
		came := a.blobs[g.manifest.Digest] && a.blobs[g.config] && !attached(g.manifest)
		if o.Select != Available && o.Select != Sparse || t.images == 0 || came {
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

// unpackable is the error of an image that is whole, but can't be unpacked.
type unpackable struct{ error }

func (u unpackable) Unwrap() error { return u.error }

// checkLayers compares the number of a manifest's layers with the diff IDs in its config. What has no rootfs in its
// config is an artifact, whatever its type.
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
