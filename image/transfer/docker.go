package transfer

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"distkit/content"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// dockerImage is an entry of manifest.json, in what `docker save` writes and `docker load`
// takes: names of entries of the archive.
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

// listed are the names that a manifest.json holds.
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

// dockerReader makes OCI manifests of the images of an archive that has none. They depend on
// nothing but config and layers, so that an archive gives the same digest each time.
type dockerReader struct {
	*archive
	store   *content.Store
	diffIDs map[digest.Digest]digest.Digest // of layers that are compressed
}

func (a *archive) dockerImages(ctx context.Context, store *content.Store) ([]found, error) {
	images, err := parseDocker(a.docker)
	if err != nil {
		return nil, err
	}
	r := dockerReader{a, store, map[digest.Digest]digest.Digest{}}
	var all []found
	for _, img := range images {
		d, err := r.manifest(ctx, img)
		if err != nil {
			return nil, err
		}
		if len(img.RepoTags) == 0 {
			all = append(all, found{target: d})
		}
		for _, tag := range img.RepoTags {
			name, err := normalize(tag)
			if err != nil {
				return nil, err
			}
			all = append(all, found{target: d, name: name})
		}
	}
	return all, nil
}

func (r dockerReader) manifest(ctx context.Context, img dockerImage) (v1.Descriptor, error) {
	var none v1.Descriptor
	config, err := r.find(img.Config)
	if err != nil {
		return none, err
	}
	diffIDs, err := r.config(config)
	if err != nil {
		return none, err
	}
	if len(diffIDs) != len(img.Layers) {
		return none, invalid("image %s has %d layers, its config %d diff IDs", img.Config, len(img.Layers), len(diffIDs))
	}
	m := v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: config.digest, Size: config.size},
		Layers:    make([]v1.Descriptor, len(img.Layers)),
	}
	for i, name := range img.Layers {
		layer, err := r.find(name)
		if err != nil {
			return none, err
		}
		got, err := r.diffID(ctx, layer)
		if err != nil {
			return none, fmt.Errorf("layer %s: %w", name, err)
		}
		if got != diffIDs[i] {
			return none, damaged("layer %s: its diff ID is %s, config %s says %s", name, got, img.Config, diffIDs[i])
		}
		m.Layers[i] = v1.Descriptor{MediaType: layerType(layer.compression), Digest: layer.digest, Size: layer.size}
	}
	b, err := json.Marshal(m)
	if err != nil {
		return none, err
	}
	if len(b) > image.MaxDocument {
		return none, invalid("image %s has too many layers: %d", img.Config, len(img.Layers))
	}
	d := v1.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	w, err := r.store.BlobWriter(ctx, "import:manifest of "+img.Config, d.Size, d.Digest, true)
	if errdefs.IsAlreadyExists(err) {
		return d, nil
	}
	if err != nil {
		return none, fmt.Errorf("store manifest of %s: %w", img.Config, err)
	}
	defer w.Abort()
	if err := w.Truncate(0); err != nil {
		return none, fmt.Errorf("store manifest of %s: %w", img.Config, err)
	}
	if _, err := io.Copy(w, bytes.NewReader(b)); err != nil {
		return none, fmt.Errorf("store manifest of %s: %w", img.Config, err)
	}
	if err := w.Commit(ctx, d.Size, d.Digest, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		return none, fmt.Errorf("store manifest of %s: %w", img.Config, err)
	}
	return d, nil
}

func layerType(compression string) string {
	if compression == "" {
		return v1.MediaTypeImageLayer
	}
	return v1.MediaTypeImageLayer + "+" + compression
}

// config returns the diff IDs that a config gives.
func (r dockerReader) config(f file) ([]digest.Digest, error) {
	if f.size > image.MaxDocument {
		return nil, invalid("config %s has %d bytes, more than %d", f.digest, f.size, image.MaxDocument)
	}
	blob, err := r.store.File(f.digest)
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	var config struct {
		RootFS *v1.RootFS `json:"rootfs"`
	}
	b, err := io.ReadAll(io.LimitReader(blob, image.MaxDocument))
	if err != nil {
		return nil, fmt.Errorf("read config %s: %w", f.digest, err)
	}
	if err := image.Decode(b, &config); err != nil {
		return nil, invalid("config %s: %w", f.digest, err)
	}
	if config.RootFS == nil {
		return nil, invalid("config %s has no rootfs: no image config", f.digest)
	}
	return config.RootFS.DiffIDs, nil
}

// diffID is the digest of the layer's tar: its own, or that of what it inflates to.
func (r dockerReader) diffID(ctx context.Context, f file) (digest.Digest, error) {
	if f.compression == "" {
		return f.digest, nil
	}
	if id, ok := r.diffIDs[f.digest]; ok {
		return id, nil
	}
	blob, err := r.store.File(f.digest)
	if err != nil {
		return "", err
	}
	defer blob.Close()
	plain, stop, err := inflate(&source{ctx: ctx, r: blob.File}, f.compression)
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

// isDocker tells whether `docker load` takes what a manifest refers to.
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
