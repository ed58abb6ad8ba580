package transfer

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Format selects the readers of an export.
type Format int

// Formats of an export.
const (
	Both   Format = iota // an OCI layout that docker can read too
	OCI                  // only an OCI layout
	Docker               // only what docker reads: manifest.json, configs and layers
)

// ParseFormat parses both, oci or docker.
func ParseFormat(s string) (Format, error) {
	i := slices.Index([]string{"both", "oci", "docker"}, s)
	if i < 0 {
		return 0, invalid("format %.40q is not one of both, oci, docker", s)
	}
	return Format(i), nil
}

// ExportOptions select how much of an index is exported, and in what form.
type ExportOptions struct {
	Select Selection
	// Platform selects the manifest of an index that isn't exported as a whole, and the one for docker.
	Platform *image.Platform
	Format   Format
	// Referrers of exported documents are exported too, and their own referrers. The map is by subject. ArtifactTypes
	// selects some of them; none means all.
	Referrers     map[digest.Digest][]v1.Descriptor
	ArtifactTypes []string
}

// Export writes images as a tar with an OCI layout. It also has a manifest.json for `docker load`, with the images that
// docker accepts. The same images always give the same bytes: names and blobs are sorted, and times are zero. Names and
// labels are annotations in index.json: io.containerd.image.name is the full name, and
// org.opencontainers.image.ref.name the tag, or the full name if two images have the same tag. An image may have no
// name.
//
// NotFound, before anything is written: a blob or the platform is missing. InvalidArgument: a name points at something
// other than a manifest or index, or at something that the format can't hold. DataLoss: a blob is corrupt; the archive
// then lacks its end-of-archive marker.
func Export(ctx context.Context, store *content.Store, w io.Writer, images []image.Image, o ExportOptions) error {
	e, err := plan(ctx, store, images, o)
	if err != nil {
		return err
	}
	return e.write(ctx, tarSink{tar.NewWriter(w)})
}

// ExportDir is [Export] into a directory, which it creates. The directory is not a layout before it is complete and on
// disk, and an interrupted export into it is continued. AlreadyExists: it is a layout. FailedPrecondition: it has other
// files.
func ExportDir(ctx context.Context, store *content.Store, dir string, images []image.Image, o ExportOptions) error {
	if o.Format == Docker {
		return invalid("docker reads archives, not directories")
	}
	e, err := plan(ctx, store, images, o)
	if err != nil {
		return err
	}
	to, err := newDirSink(dir)
	if err != nil {
		return err
	}
	defer to.close()
	return e.write(ctx, to)
}

// plan determines what an export will contain.
func plan(ctx context.Context, store *content.Store, images []image.Image, o ExportOptions) (*exporter, error) {
	e := &exporter{
		o: o, store: store,
		blobs:   map[digest.Digest]int64{},
		settled: map[digest.Digest]settled{},
		places:  map[string]int{},
		tags:    map[string]bool{},
	}
	images = slices.Clone(images)
	slices.SortFunc(images, func(a, b image.Image) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Target.Digest, b.Target.Digest))
	})
	same := func(a, b image.Image) bool { return a.Name == b.Name && a.Target.Digest == b.Target.Digest }
	e.images = slices.CompactFunc(images, same)
	for i := range e.images {
		if err := e.add(ctx, &e.images[i]); err != nil {
			return nil, fmt.Errorf("export %s: %w", cmp.Or(e.images[i].Name, string(e.images[i].Target.Digest)), err)
		}
	}
	if err := e.addReferrers(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

// addReferrers collects the referrers of everything exported, level by level. In a sparse export it leaves out
// incomplete ones.
func (e *exporter) addReferrers(ctx context.Context) error {
	if len(e.o.Referrers) == 0 {
		return nil
	}
	f := finder{store: e.store, types: e.o.ArtifactTypes, sparse: e.o.Select == Sparse, lists: e.o.Referrers, blobs: e.blobs}
	found, err := f.find(ctx)
	e.referrers = found
	return err
}

type exporter struct {
	o      ExportOptions
	store  *content.Store
	images []image.Image // sorted by name
	// referrers have no name, and come after the images.
	referrers []layout.Referrer
	blobs     map[digest.Digest]int64
	settled   map[digest.Digest]settled
	docker    []dockerImage
	places    map[string]int  // positions in docker, by config and layers
	tags      map[string]bool // in docker
}

// settled is what is exported for a target, and the position of its image in exporter.docker.
type settled struct {
	target v1.Descriptor
	docker int // -1 if there is none
}

// add collects the blobs of an image, and sets the target that is exported for it.
func (e *exporter) add(ctx context.Context, img *image.Image) error {
	s, ok := e.settled[img.Target.Digest]
	if !ok {
		var err error
		if s, err = e.settle(ctx, img.Target); err != nil {
			return err
		}
		e.settled[img.Target.Digest] = s
	}
	img.Target = s.target
	if s.docker < 0 {
		return nil
	}
	if tag := repoTag(img.Name); tag != "" && !e.tags[tag] {
		e.tags[tag] = true
		e.docker[s.docker].RepoTags = append(e.docker[s.docker].RepoTags, tag)
	}
	return nil
}

func (e *exporter) settle(ctx context.Context, target v1.Descriptor) (s settled, err error) {
	walker := image.Walker{Store: e.store, Platform: e.o.Platform}
	choice := e.o.Select
	if e.o.Format == Docker && choice == Available {
		choice = One // docker doesn't read indexes
	}
	var t *tree
	if choice != One {
		if t, err = survey(ctx, e.store, target); err != nil {
			return s, err
		}
		switch rootMissing := t.root.MediaType == ""; {
		case len(t.gaps) == 0, choice == Sparse && t.images > 0:
		case choice == Available && !rootMissing:
			t = nil
		default:
			return s, absent("blob %s is not in the store", t.gaps[0].missing.Digest)
		}
	}
	if t == nil { // export the platform's manifest instead of the index
		if target, err = walker.Manifest(ctx, target); err != nil {
			return s, err
		}
		if t, err = survey(ctx, e.store, target); err != nil {
			return s, err
		}
		if len(t.gaps) > 0 {
			return s, absent("blob %s is not in the store", t.gaps[0].missing.Digest)
		}
	}
	s.target = t.root
	if s.docker, err = e.addDocker(ctx, walker, s.target, t.blobs); err != nil {
		return s, err
	}
	if s.docker < 0 && e.o.Format == Docker {
		return s, invalid("docker can't read it: it isn't an image, or a layer is missing or of a type unknown to docker")
	}
	for _, d := range t.blobs {
		e.blobs[d.Digest] = d.Size
	}
	return s, nil
}

// addDocker adds an image to docker's manifest.json, if docker can read it. It returns the position, or -1.
func (e *exporter) addDocker(ctx context.Context, walker image.Walker, target v1.Descriptor, blobs map[digest.Digest]v1.Descriptor) (int, error) {
	c, err := walker.Contents(ctx, target)
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return -1, nil // an artifact, or an index without this platform that is exported as a whole
	}
	if err != nil {
		return -1, err
	}
	children, err := walker.Children(ctx, c.Manifest)
	if err != nil {
		return -1, err
	}
	for _, d := range append(children, c.Manifest) {
		if _, written := blobs[d.Digest]; !written {
			return -1, nil // a foreign layer, or a gap in a sparse index
		}
	}
	if !isDocker(c.Layers, children[0].MediaType) {
		return -1, nil
	}
	d := dockerImage{Config: blobPath(children[0].Digest), RepoTags: []string{}, Layers: []string{}}
	for _, l := range c.Layers {
		d.Layers = append(d.Layers, blobPath(l.Digest))
	}
	if e.o.Format == Docker {
		delete(blobs, c.Manifest.Digest)
	}
	key := d.Config + " " + strings.Join(d.Layers, " ")
	i, ok := e.places[key]
	if !ok {
		i = len(e.docker)
		e.places[key] = i
		e.docker = append(e.docker, d)
	}
	return i, nil
}

func blobPath(d digest.Digest) string {
	return path.Join(v1.ImageBlobsDir, string(d.Algorithm()), d.Encoded())
}

// index returns the archive's index.json.
func index(images []image.Image, referrers []layout.Referrer) v1.Index {
	ix := v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{},
	}
	tags := map[string]int{}
	for _, img := range images {
		tags[tagOf(img.Name)]++
	}
	for _, img := range images {
		d := img.Target
		d.Annotations = labels(img.Labels)
		if img.Name != "" {
			if d.Annotations == nil {
				d.Annotations = map[string]string{}
			}
			ref := tagOf(img.Name)
			if tags[ref] > 1 {
				ref = img.Name
			}
			d.Annotations[AnnotationImageName] = img.Name
			d.Annotations[v1.AnnotationRefName] = ref
		}
		ix.Manifests = append(ix.Manifests, d)
	}
	for _, r := range referrers {
		ix.Manifests = append(ix.Manifests, r.Descriptor)
	}
	return ix
}

// sink receives an export: a tar or a directory.
type sink interface {
	// document is called first, for each document; then directory; then blob, for all blobs in the order of their
	// digests.
	document(name string, b []byte) error
	directory(name string) error
	blob(ctx context.Context, d digest.Digest, size int64, write func(io.Writer) error) error
	end() error
}

// write writes documents before blobs, so that a reader of the stream knows early what it contains.
func (e *exporter) write(ctx context.Context, to sink) error {
	type document struct {
		name  string
		value any
	}
	var documents []document
	if e.o.Format != Docker {
		documents = append(documents, document{v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion}},
			document{v1.ImageIndexFile, index(e.images, e.referrers)})
	}
	if e.o.Format == Docker && e.docker == nil {
		e.docker = []dockerImage{}
	}
	if e.o.Format != OCI && e.docker != nil {
		documents = append(documents, document{dockerManifestsFile, e.docker})
	}
	for _, d := range documents {
		b, err := json.Marshal(d.value)
		if err != nil {
			return fmt.Errorf("encode %s: %w", d.name, err)
		}
		if len(b) > image.MaxDocument {
			return invalid("%s would have %d bytes, more than %d: export fewer images at a time", d.name, len(b), image.MaxDocument)
		}
		if err := to.document(d.name, b); err != nil {
			return fmt.Errorf("write %s: %w", d.name, err)
		}
	}
	digests := slices.Sorted(maps.Keys(e.blobs))
	dirs := []string{v1.ImageBlobsDir}
	for _, d := range digests {
		if dir := path.Dir(blobPath(d)); !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		if err := to.directory(dir); err != nil {
			return fmt.Errorf("write %s: %w", dir, err)
		}
	}
	buf := make([]byte, 256<<10)
	for _, d := range digests {
		err := to.blob(ctx, d, e.blobs[d], func(w io.Writer) error { return e.blob(ctx, w, d, buf) })
		if err != nil {
			return fmt.Errorf("write %s: %w", d, err)
		}
	}
	return to.end()
}

// tarSink writes a tar.
type tarSink struct{ *tar.Writer }

func (t tarSink) document(name string, b []byte) error {
	err := t.WriteHeader(header(name, 0o644, int64(len(b))))
	if err == nil {
		_, err = t.Write(b)
	}
	return err
}

func (t tarSink) directory(name string) error { return t.WriteHeader(header(name+"/", 0o755, 0)) }

func (t tarSink) blob(ctx context.Context, d digest.Digest, size int64, write func(io.Writer) error) error {
	if err := t.WriteHeader(header(blobPath(d), 0o444, size)); err != nil {
		return err
	}
	err := write(t)
	if errors.Is(err, tar.ErrWriteTooLong) {
		return damaged("blob grew while it was read")
	}
	return err
}

func (t tarSink) end() error {
	if err := t.Close(); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	return nil
}

func header(name string, mode, size int64) *tar.Header {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0)}
	if strings.HasSuffix(name, "/") {
		h.Typeflag = tar.TypeDir
	}
	return h
}

// blob writes a blob, and verifies it, so that a corrupt blob here isn't mistaken for damage to the archive.
func (e *exporter) blob(ctx context.Context, w io.Writer, d digest.Digest, buf []byte) error {
	f, err := e.store.File(d)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Size() != e.blobs[d] {
		return damaged("blob has %d bytes, its descriptor says %d", f.Size(), e.blobs[d])
	}
	h := d.Algorithm().Hash()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		if _, werr := w.Write(buf[:n]); werr != nil {
			return werr
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if got := digest.NewDigest(d.Algorithm(), h); got != d {
		return damaged("blob is corrupt, it hashes to %s", got)
	}
	return nil
}
