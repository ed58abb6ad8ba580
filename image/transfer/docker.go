package transfer

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"distkit/compression"
	"distkit/content"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerImage is an image in manifest.json, which `docker save` writes and `docker load` reads. Config and Layers are
// names of entries in the archive.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func parseDocker(b []byte) ([]dockerImage, error) {
	var images []dockerImage
	if err := image.Decode(b, &images); err != nil {
		return nil, invalid("%s: %w", dockerManifestsFile, err)
	}
	return images, nil
}

// listed returns the names of entries in a manifest.json.
func listed(b []byte) (map[string]bool, error) {
	images, err := parseDocker(b)
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, img := range images {
		for _, name := range append(img.Layers, img.Config) {
			if clean, err := entryName(name); err == nil {
				names[clean] = true
			}
		}
	}
	return names, nil
}

// Bounds for an archive: the manifests that are created, and the names that are given, about as many as fit into an
// index.json.
const (
	maxImages = 1 << 12
	maxGiven  = 25_000
)

// dockerReader creates OCI manifests for the images of an archive without them. They depend only on the config and the
// layers, so that an archive always gives the same digests.
type dockerReader struct {
	*archive
	store   *content.Store                  // nil if nothing is to be stored
	diffIDs map[digest.Digest]digest.Digest // of compressed layers
	configs map[digest.Digest][]digest.Digest
	made    map[string]v1.Descriptor // manifests by the digests of config and layers
}

// dockerImages returns the images in an archive's manifest.json, except those that o excludes.
func (a *archive) dockerImages(ctx context.Context, store *content.Store, o ImportOptions) ([]found, error) {
	images, err := parseDocker(a.docker)
	if err != nil {
		return nil, err
	}
	r := dockerReader{a, store, map[digest.Digest]digest.Digest{}, map[digest.Digest][]digest.Digest{}, map[string]v1.Descriptor{}}
	var all []found
	for _, img := range images {
		tags := make([]found, 0, max(1, len(img.RepoTags)))
		for _, tag := range img.RepoTags {
			name, err := normalize(tag)
			if err != nil {
				return nil, err
			}
			if o.maybe(name) {
				tags = append(tags, found{name: name})
			}
		}
		if len(img.RepoTags) == 0 {
			tags = append(tags, found{})
		}
		if len(tags) == 0 {
			continue
		}
		d, err := r.manifest(ctx, img)
		if err != nil {
			return nil, err
		}
		for _, f := range tags {
			f.target = d
			all = append(all, f)
		}
		if len(all) > maxGiven {
			return nil, invalid("%s has more than %d names", dockerManifestsFile, maxGiven)
		}
	}
	return all, nil
}

// manifest returns the manifest of an image. It creates one for each combination of config and layers.
func (r dockerReader) manifest(ctx context.Context, img dockerImage) (v1.Descriptor, error) {
	var zero v1.Descriptor
	config, err := r.find(img.Config)
	if err != nil {
		return zero, err
	}
	var diffIDs []digest.Digest
	if slices.Contains(img.Layers, "") && r.store != nil {
		if diffIDs, err = r.config(config); err != nil {
			return zero, err
		}
	}
	layers := make([]file, len(img.Layers))
	key := strings.Builder{}
	key.WriteString(string(config.digest))
	for i, name := range img.Layers {
		if name == "" {
			layers[i], err = r.layerOfStore(ctx, diffIDs, i)
		} else {
			layers[i], err = r.find(name)
		}
		if err != nil {
			return zero, fmt.Errorf("layer %d of image %s: %w", i+1, img.Config, err)
		}
		key.WriteString(" " + string(layers[i].digest))
	}
	if d, ok := r.made[key.String()]; ok {
		return d, nil
	}
	if len(r.made) == maxImages {
		return zero, invalid("%s has more than %d images", dockerManifestsFile, maxImages)
	}
	if r.store != nil {
		if err := r.verify(ctx, img, config, layers); err != nil {
			return zero, err
		}
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: config.digest, Size: config.size},
		Layers:    make([]v1.Descriptor, len(layers)),
	}
	for i, layer := range layers {
		mediaType, err := layerType(layer.compression)
		if err != nil {
			return zero, fmt.Errorf("layer %s: %w", img.Layers[i], err)
		}
		m.Layers[i] = v1.Descriptor{MediaType: mediaType, Digest: layer.digest, Size: layer.size}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return zero, err
	}
	d := v1.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if r.store != nil {
		d, err = image.Walker{Store: r.store}.Put(ctx, m.MediaType, b)
	}
	if err != nil {
		return zero, fmt.Errorf("manifest of %s: %w", img.Config, err)
	}
	r.made[key.String()] = d
	return d, nil
}

// verify compares the layers with the diff IDs in the config.
func (r dockerReader) verify(ctx context.Context, img dockerImage, config file, layers []file) error {
	diffIDs, err := r.config(config)
	if err != nil {
		return err
	}
	if len(diffIDs) != len(layers) {
		return invalid("image %s has %d layers, its config %d diff IDs", img.Config, len(layers), len(diffIDs))
	}
	r.configs[config.digest] = diffIDs
	for i, layer := range layers {
		got, err := r.diffID(ctx, layer)
		if err != nil {
			return fmt.Errorf("layer %s: %w", img.Layers[i], err)
		}
		if got != diffIDs[i] {
			return damaged("layer %s: its diff ID is %s, config %s says %s", img.Layers[i], got, img.Config, diffIDs[i])
		}
	}
	return nil
}

// layerOfStore returns a layer that the archive leaves out, by an empty name, because the reader is assumed to have it:
// the blob whose digest is the diff ID. DataLoss if the store doesn't have it.
func (r dockerReader) layerOfStore(ctx context.Context, diffIDs []digest.Digest, i int) (file, error) {
	if i >= len(diffIDs) {
		return file{}, damaged("the archive doesn't have it, and the config has %d diff IDs", len(diffIDs))
	}
	if err := content.Validate(diffIDs[i]); err != nil {
		return file{}, err
	}
	size, err := r.store.Size(diffIDs[i])
	if errdefs.IsNotFound(err) {
		err = damaged("neither the archive nor the store has the blob %s", diffIDs[i])
	}
	return file{digest: diffIDs[i], size: size}, err
}

// layerType returns the media type of a layer. NotImplemented for compressions without an OCI type.
func layerType(format compression.Format) (string, error) {
	switch format {
	case compression.None:
		return v1.MediaTypeImageLayer, nil
	case compression.Gzip, compression.Zstd:
		return v1.MediaTypeImageLayer + "+" + string(format), nil
	}
	return "", errclass.Errorf(errdefs.ErrNotImplemented, "it is compressed with %s, but OCI layers are plain or compressed with gzip or zstd", format)
}

// config returns the diff IDs in a config.
func (r dockerReader) config(f file) ([]digest.Digest, error) {
	if diffIDs, ok := r.configs[f.digest]; ok {
		return diffIDs, nil
	}
	if f.size > image.MaxDocument {
		return nil, invalid("config %s has %d bytes, more than %d", f.digest, f.size, image.MaxDocument)
	}
	blob, err := r.store.File(f.digest)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	b, err := io.ReadAll(io.LimitReader(blob, image.MaxDocument))
	if err != nil {
		return nil, fmt.Errorf("read config %s: %w", f.digest, err)
	}
	diffIDs, err := image.DiffIDs(b)
	if err != nil {
		return nil, invalid("config %s: %w", f.digest, err)
	}
	if diffIDs == nil {
		return nil, invalid("config %s has no rootfs, so it isn't an image's", f.digest)
	}
	return diffIDs, nil
}

// diffID returns the digest of a layer's uncompressed tar.
func (r dockerReader) diffID(ctx context.Context, f file) (digest.Digest, error) {
	if f.compression == compression.None {
		return f.digest, nil
	}
	if _, err := layerType(f.compression); err != nil {
		return "", err
	}
	if id, ok := r.diffIDs[f.digest]; ok {
		return id, nil
	}
	blob, err := r.store.File(f.digest)
	if err != nil {
		return "", err
	}
	defer blob.Close()
	plain, stop, err := compression.NewReader(bufio.NewReader(&input{ctx: ctx, r: blob.File}))
	if err != nil {
		return "", damaged("%w", err)
	}
	defer stop()
	h := digest.Canonical.Digester()
	if _, err := io.Copy(h.Hash(), plain); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return "", damaged("%w", err)
	}
	r.diffIDs[f.digest] = h.Digest()
	return h.Digest(), nil
}

// isDocker reports whether `docker load` accepts a manifest with these layers and this type of config.
func isDocker(layers []image.Layer, config string) bool {
	if config != v1.MediaTypeImageConfig && config != dockerConfig {
		return false
	}
	for _, l := range layers {
		switch l.MediaType {
		case v1.MediaTypeImageLayer, v1.MediaTypeImageLayerGzip, v1.MediaTypeImageLayerZstd,
			dockerLayer, dockerLayer + ".gzip", dockerLayer + ".zstd":
		default:
			return false
		}
	}
	return true
}
