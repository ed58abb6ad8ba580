package transfer

import (
	"context"
	"io"

	"distkit/content"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportOptions tell which images of an archive are named, and how.
type ImportOptions struct {
	Select   Selection
	Platform *image.Platform // for One

	// Name is the name of the archive's one image, whatever the archive calls it.
	Name string
	// BaseName precedes the tag of an image that the archive gives a tag alone, or the digest
	// of one that it gives no name at all.
	BaseName string
}

// found is an image of an archive with one of its names.
type found struct {
	target v1.Descriptor // its annotations are labels
	name   string        // "" where there is none
	tag    string        // a name that is a tag alone
}

// Import stores the blobs of an archive, plain or compressed with gzip or zstd, then names its
// images, as containerd and docker do: by the annotations io.containerd.image.name and
// org.opencontainers.image.ref.name of its index.json; in an archive that is no OCI layout, by
// the RepoTags of its manifest.json, normalised. A name that is there points at the new image
// from then on. It returns what was named, in the archive's order.
//
// All images are named in one change, or none is: what a failed import brought are blobs
// without a name. DataLoss: the archive is truncated or damaged, a blob does not hash to its
// name, a layer not to its diff ID, or one is missing. InvalidArgument: it is no image
// archive, has an entry that no image archive has, or an image without a name. NotFound: it
// has nothing for the platform. FailedPrecondition: an image layout of an unknown version.
func Import(ctx context.Context, store *content.Store, names *image.Names, r io.Reader, o ImportOptions) ([]image.Image, error) {
	a, err := readArchive(ctx, store, r)
	if err != nil {
		return nil, err
	}
	var all []found
	switch {
	case a.layout != nil:
		all, err = a.layoutImages()
	case a.docker != nil:
		all, err = a.dockerImages(ctx, store)
	default:
		err = invalid("no image archive: it has neither oci-layout nor %s", dockerManifestsFile)
	}
	if err != nil {
		return nil, err
	}
	images, err := o.name(all)
	if err != nil {
		return nil, err
	}
	for i := range images {
		if images[i].Target, err = o.verify(ctx, store, a, images[i].Target); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return images, names.ReplaceAll(ctx, images)
}

// layoutImages are the entries of an archive's index.json.
func (a *archive) layoutImages() ([]found, error) {
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
	var index v1.Index
	if err := image.Decode(a.index, &index); err != nil {
		return nil, invalid("%s: %w", v1.ImageIndexFile, err)
	}
	var all []found
	for _, d := range index.Manifests {
		if err := content.Validate(d.Digest); err != nil {
			return nil, err
		}
		f := found{target: d, name: d.Annotations[AnnotationImageName]}
		if ref := d.Annotations[v1.AnnotationRefName]; f.name == "" && isTag(ref) {
			f.tag = ref
		} else if f.name == "" {
			f.name = ref
		}
		f.target.Annotations = labels(d.Annotations)
		all = append(all, f)
	}
	return all, nil
}

// labels are the annotations of an entry that are no names and no times of ours.
func labels(annotations map[string]string) map[string]string {
	var kept map[string]string
	for k, v := range annotations {
		switch k {
		case v1.AnnotationRefName, AnnotationImageName, image.AnnotationCreated, image.AnnotationUpdated:
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
	d.Annotations = nil
	t := newTree(store)
	if here, err := t.here(ctx, d); err != nil {
		return d, err
	} else if !here {
		return d, damaged("image %s is not in the archive", d.Digest)
	}
	if o.Select == One {
		// An index whose other platforms lie is none of our business; this one's may not.
		m, err := image.Walker{Store: store, Platform: o.Platform}.Manifest(ctx, d)
		if err != nil {
			return d, err
		}
		d = m
		d.Annotations = nil
	}
	whole, err := t.add(ctx, d)
	if err != nil || whole {
		return d, err
	}
	for _, g := range t.gaps {
		// Of an index, manifests may be missing for platforms that nobody put in; what came
		// with its config was meant to be whole.
		if o.Select != Available && o.Select != Sparse || t.whole == 0 || a.blobs[g.manifest.Digest] && a.blobs[g.config] {
			return d, damaged("image %s is incomplete: %s is not in the archive", d.Digest, g.missing.Digest)
		}
	}
	return d, nil
}
