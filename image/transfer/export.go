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
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ExportOptions tell how much of an index is written.
type ExportOptions struct {
	Select Selection
	// Platform selects the manifest of an index, where it is not written whole, and the one
	// that docker is given.
	Platform *image.Platform
}

// Export writes images as an OCI layout in a tar, which also has the manifest.json that
// `docker load` reads, for those images that docker can take. The same images give the same
// bytes: names and blobs are sorted, and times are zero. Names and labels are annotations of
// the entries in index.json: io.containerd.image.name is the full name and
// org.opencontainers.image.ref.name the tag, or the full name too if two have that tag.
//
// NotFound: a blob, or the platform, is not there, told before the first byte is written.
// InvalidArgument: a name points at what is no manifest or index. DataLoss: a blob is corrupt;
// the archive then ends without its end-of-archive marker.
func Export(ctx context.Context, store *content.Store, w io.Writer, images []image.Image, o ExportOptions) error {
	e := exporter{o: o, tree: newTree(store)}
	images = slices.Clone(images)
	slices.SortFunc(images, func(a, b image.Image) int { return cmp.Compare(a.Name, b.Name) })
	images = slices.CompactFunc(images, func(a, b image.Image) bool { return a.Name == b.Name })
	for i := range images {
		if err := e.add(ctx, &images[i]); err != nil {
			return fmt.Errorf("export %s: %w", images[i].Name, err)
		}
	}
	return e.write(ctx, w, images)
}

type exporter struct {
	o      ExportOptions
	tree   *tree
	docker []dockerImage
	at     map[digest.Digest]int // of manifests in docker
}

// add collects the blobs of an image, and settles what its name stands for.
func (e *exporter) add(ctx context.Context, img *image.Image) error {
	walker := image.Walker{Store: e.tree.walker.Store, Platform: e.o.Platform}
	if e.o.Select == One {
		if err := e.one(ctx, walker, img); err != nil {
			return err
		}
		return e.addDocker(ctx, walker, img)
	}
	trial := newTree(e.tree.walker.Store)
	whole, err := trial.add(ctx, img.Target)
	if err != nil {
		return err
	}
	switch {
	case whole:
	case e.o.Select == Sparse && trial.whole > 0:
	case e.o.Select == Available && trial.gaps[0].manifest.Digest != img.Target.Digest:
		if err := e.one(ctx, walker, img); err != nil {
			return err
		}
		return e.addDocker(ctx, walker, img)
	default:
		return absent("blob %s is not in the store", trial.gaps[0].missing.Digest)
	}
	maps.Copy(e.tree.blobs, trial.blobs)
	return e.addDocker(ctx, walker, img)
}

// one puts the manifest for the platform in the place of an index.
func (e *exporter) one(ctx context.Context, walker image.Walker, img *image.Image) error {
	m, err := walker.Manifest(ctx, img.Target)
	if err != nil {
		return err
	}
	t := newTree(walker.Store)
	whole, err := t.add(ctx, m)
	if err != nil {
		return err
	}
	if !whole {
		return absent("blob %s is not in the store", t.gaps[0].missing.Digest)
	}
	maps.Copy(e.tree.blobs, t.blobs)
	img.Target = m
	return nil
}

// addDocker adds what `docker load` is to make of an image, if it can take it.
func (e *exporter) addDocker(ctx context.Context, walker image.Walker, img *image.Image) error {
	m, err := walker.Manifest(ctx, img.Target)
	if errdefs.IsNotFound(err) {
		return nil // nothing for this platform in an index that is written whole
	}
	if err != nil {
		return err
	}
	if _, written := e.tree.blobs[m.Digest]; !written {
		return nil
	}
	i, there := e.at[m.Digest]
	if !there {
		children, err := walker.Children(ctx, m)
		if err != nil {
			return err
		}
		for _, c := range children {
			if _, written := e.tree.blobs[c.Digest]; !written {
				return nil // a foreign layer
			}
		}
		layers, err := walker.Layers(ctx, m)
		if errdefs.IsInvalidArgument(err) || err == nil && !isDocker(layers, children[0].MediaType) {
			return nil // an artifact, not an image
		}
		if err != nil {
			return err
		}
		d := dockerImage{Config: blobPath(children[0].Digest), RepoTags: []string{}, Layers: []string{}}
		for _, l := range layers {
			d.Layers = append(d.Layers, blobPath(l.Digest))
		}
		if e.at == nil {
			e.at = map[digest.Digest]int{}
		}
		i = len(e.docker)
		e.at[m.Digest] = i
		e.docker = append(e.docker, d)
	}
	if tag := repoTag(img.Name); tag != "" && !slices.Contains(e.docker[i].RepoTags, tag) {
		e.docker[i].RepoTags = append(e.docker[i].RepoTags, tag)
	}
	return nil
}

func blobPath(d digest.Digest) string {
	return path.Join(v1.ImageBlobsDir, string(d.Algorithm()), d.Encoded())
}

// index is the archive's index.json.
func index(images []image.Image) v1.Index {
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
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		ref := tagOf(img.Name)
		if tags[ref] > 1 {
			ref = img.Name
		}
		d.Annotations[AnnotationImageName] = img.Name
		d.Annotations[v1.AnnotationRefName] = ref
		ix.Manifests = append(ix.Manifests, d)
	}
	return ix
}

// write writes the documents before the blobs, so that who reads the stream knows early what
// it holds.
func (e *exporter) write(ctx context.Context, w io.Writer, images []image.Image) error {
	t := tar.NewWriter(w)
	documents := []struct {
		name  string
		value any
	}{
		{v1.ImageLayoutFile, v1.ImageLayout{Version: v1.ImageLayoutVersion}},
		{v1.ImageIndexFile, index(images)},
		{dockerManifestsFile, e.docker},
	}
	if e.docker == nil {
		documents = documents[:2]
	}
	for _, d := range documents {
		b, err := json.Marshal(d.value)
		if err != nil {
			return fmt.Errorf("encode %s: %w", d.name, err)
		}
		if len(b) > image.MaxDocument {
			return invalid("%s would have %d bytes, more than %d: export fewer images at a time", d.name, len(b), image.MaxDocument)
		}
		if err := t.WriteHeader(header(d.name, 0o644, int64(len(b)))); err != nil {
			return fmt.Errorf("write archive: %w", err)
		}
		if _, err := t.Write(b); err != nil {
			return fmt.Errorf("write archive: %w", err)
		}
	}
	digests := slices.SortedFunc(maps.Keys(e.tree.blobs), func(a, b digest.Digest) int { return strings.Compare(string(a), string(b)) })
	dirs := []string{v1.ImageBlobsDir + "/"}
	for _, d := range digests {
		if dir := path.Dir(blobPath(d)) + "/"; !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		if err := t.WriteHeader(header(dir, 0o755, 0)); err != nil {
			return fmt.Errorf("write archive: %w", err)
		}
	}
	buf := make([]byte, 256<<10)
	for _, d := range digests {
		if err := e.blob(ctx, t, d, buf); err != nil {
			return fmt.Errorf("write %s: %w", d, err)
		}
	}
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

// blob writes a blob and verifies it once more: what is corrupt here must not pass for an
// archive that was damaged on its way.
func (e *exporter) blob(ctx context.Context, t *tar.Writer, d digest.Digest, buf []byte) error {
	f, err := e.tree.walker.Store.File(d)
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Size() != e.tree.blobs[d].Size {
		return damaged("blob has %d bytes, its descriptor says %d", f.Size(), e.tree.blobs[d].Size)
	}
	if err := t.WriteHeader(header(blobPath(d), 0o444, f.Size())); err != nil {
		return err
	}
	h := d.Algorithm().Hash()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		if _, werr := t.Write(buf[:n]); werr != nil {
			if errors.Is(werr, tar.ErrWriteTooLong) {
				return damaged("blob grew while it was read")
			}
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
