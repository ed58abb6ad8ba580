// Package checkpoint saves containers to the content store and restores them. A checkpoint is an OCI index, in
// containerd's form. It lists the state of the processes, the configuration, the changed files, and the image.
//
// [Save] stores a container. [Describe] fills in the record of a container to be restored, and [Load] applies the
// checkpoint to it. A checkpoint is untrusted: see [Load] for what it may decide.
package checkpoint

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

	"distkit/archive"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/content"
	"distkit/disk"
	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of the parts. Except for the configuration's, they are containerd's.
const (
	typeState  = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
	typeConfig = "application/vnd.oci.runtime.config.v1+json"
	typeRW     = "application/vnd.containerd.container.rw.tar"
)

// Annotations of the index.
const (
	nameImage    = "org.opencontainers.image.ref.name"
	nameDriver   = "io.containerd.checkpoint.snapshotter"
	nameRuntime  = "io.containerd.checkpoint.runtime"
	maxDocuments = 16 << 20
)

// Save stores a container at one instant, and returns the digest of the index.
func Save(ctx context.Context, store *content.Store, snapshots containers.Snapshots, c *runtime.Container, exit bool) (digest.Digest, error) {
	dir, err := os.MkdirTemp(c.Dir(), "checkpoint-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	s := saver{ctx: ctx, store: store, ref: "checkpoint-" + c.ID + "-" + filepath.Base(dir)}
	err = c.Checkpoint(ctx, dir, exit, func() error {
		if err := s.add(typeState, func(w io.Writer) error { return layer(ctx, w, "", dir) }); err != nil {
			return err
		}
		config, err := configuration(c)
		if err == nil {
			err = s.add(typeConfig, func(w io.Writer) error { _, err := w.Write(config); return err })
		}
		if err != nil || c.Snapshot == nil {
			return err
		}
		return snapshots.Below(ctx, *c.Snapshot, func(lower string) error {
			return s.add(typeRW, func(w io.Writer) error { return layer(ctx, w, lower, filepath.Join(c.Dir(), "rootfs")) })
		})
	})
	if err != nil {
		return "", err
	}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Annotations: map[string]string{}}
	if c.Image != nil {
		d, err := describe(ctx, store, digest.Digest(c.Image.Digest))
		if err != nil {
			return "", fmt.Errorf("image of container %s: %w", c.ID, err)
		}
		s.parts = append(s.parts, d)
		index.Annotations[nameImage] = c.Image.Name
	}
	if c.Snapshot != nil && c.Snapshot.Driver != "" {
		index.Annotations[nameDriver] = c.Snapshot.Driver
	}
	if c.Runtime != "" {
		index.Annotations[nameRuntime] = c.Runtime
	}
	index.Manifests = s.parts
	b, err := json.Marshal(index)
	if err != nil {
		return "", err
	}
	return content.WriteBlob(ctx, store, s.ref, bytes.NewReader(b), int64(len(b)), digest.FromBytes(b))
}

// configuration returns the container's config.json. The path of a root filesystem in the container's directory is made
// relative to that.
func configuration(c *runtime.Container) ([]byte, error) {
	b, err := disk.Tree(c.BundleDir()).ReadFile("config.json", maxDocuments)
	if err != nil {
		return nil, err
	}
	var config map[string]json.RawMessage
	var root map[string]any
	if err := json.Unmarshal(b, &config); err != nil {
		return nil, fmt.Errorf("config.json of container %s: %w", c.ID, err)
	}
	if json.Unmarshal(config["root"], &root) != nil || root["path"] != filepath.Join(c.Dir(), "rootfs") {
		return b, nil
	}
	root["path"] = "rootfs"
	if config["root"], err = json.Marshal(root); err != nil {
		return nil, err
	}
	return json.Marshal(config)
}

type saver struct {
	ctx   context.Context
	store *content.Store
	ref   string
	parts []v1.Descriptor
}

// add stores what write writes as a part of the checkpoint.
func (s *saver) add(mediaType string, write func(io.Writer) error) error {
	out, in := io.Pipe()
	go func() { _ = in.CloseWithError(write(in)) }()
	dgst, err := content.WriteBlob(s.ctx, s.store, fmt.Sprintf("%s-%d", s.ref, len(s.parts)), out, 0, "")
	_ = out.CloseWithError(err)
	if err != nil {
		return err
	}
	size, err := s.store.Size(dgst)
	if err != nil {
		return err
	}
	s.parts = append(s.parts, v1.Descriptor{MediaType: mediaType, Digest: dgst, Size: size})
	return nil
}

func layer(ctx context.Context, w io.Writer, lower, upper string) error {
	_, err := archive.Diff(ctx, w, lower, upper, archive.DiffOptions{Compression: archive.Uncompressed})
	return err
}

// describe returns the descriptor of a manifest or index in the store.
func describe(ctx context.Context, store *content.Store, dgst digest.Digest) (v1.Descriptor, error) {
	b, err := read(store, dgst)
	if err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{Digest: dgst, Size: int64(len(b))}
	var doc struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return d, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s: %w", dgst, err)
	}
	switch d.MediaType = doc.MediaType; {
	case d.MediaType != "":
	case doc.Manifests != nil:
		d.MediaType = v1.MediaTypeImageIndex
	default:
		d.MediaType = v1.MediaTypeImageManifest
	}
	return d, nil
}

func read(store *content.Store, dgst digest.Digest) ([]byte, error) {
	if err := content.Validate(dgst); err != nil {
		return nil, err
	}
	f, err := store.File(dgst)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > maxDocuments {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s has %d bytes, too many for a document", dgst, f.Size())
	}
	b := make([]byte, f.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, err
	}
	if digest.FromBytes(b) != dgst && dgst.Algorithm() == digest.SHA256 {
		return nil, errclass.Errorf(errdefs.ErrDataLoss, "%s is corrupt", dgst)
	}
	return b, nil
}

// stored are the parts of a checkpoint by media type. The image has the key "".
type stored struct {
	parts       map[string]v1.Descriptor
	annotations map[string]string
}

func parse(store *content.Store, dgst digest.Digest) (stored, error) {
	b, err := read(store, dgst)
	if err != nil {
		return stored{}, err
	}
	var index v1.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return stored{}, errclass.Errorf(errdefs.ErrFailedPrecondition, "checkpoint %s: %w", dgst, err)
	}
	s := stored{map[string]v1.Descriptor{}, index.Annotations}
	for _, d := range index.Manifests {
		switch d.MediaType {
		case typeState, typeConfig, typeRW:
			s.parts[d.MediaType] = d
		default:
			s.parts[""] = d
		}
	}
	for _, t := range []string{typeState, typeConfig} {
		if _, ok := s.parts[t]; !ok {
			return s, errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is no checkpoint: it has no state of processes, or no configuration", dgst)
		}
	}
	return s, nil
}

// ParseDigest parses a checkpoint's digest given by a user.
func ParseDigest(s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err != nil {
		return "", cli.Usagef("%q is no digest: %v", s, err)
	}
	return d, nil
}

// Describe completes the record of a container to be restored, and returns the checkpoint's digest. Image, runtime and
// snapshotter come from the checkpoint if the record does not name them. It is an error if criu can't restore here.
func Describe(ctx context.Context, store *content.Store, ref string, rec *runtime.Record) (digest.Digest, error) {
	dgst, err := ParseDigest(ref)
	if err != nil {
		return "", err
	}
	if err := runtime.CheckCriu(ctx); err != nil {
		return "", err
	}
	s, err := parse(store, dgst)
	if err != nil {
		return "", err
	}
	if image, ok := s.parts[""]; ok && rec.Image == nil {
		rec.Image = &runtime.ImageName{Name: s.annotations[nameImage], Digest: image.Digest.String()}
	}
	// The checkpoint may come from anywhere, so it can't name a program.
	if r := s.annotations[nameRuntime]; rec.Runtime == "" && (r == "runc" || r == "crun") {
		rec.Runtime = r
	}
	if rec.Snapshot != nil && rec.Snapshot.Driver == "" {
		rec.Snapshot.Driver = s.annotations[nameDriver]
	}
	return dgst, nil
}

// Load turns a container that has never run into the stored one. It applies the changes to its files. If the container
// has no configuration, it writes the stored one; what that asks for beyond any container's defaults must be allowed by
// grants. The state of the processes is then in [runtime.Container.CheckpointDir], until the container is removed.
func Load(ctx context.Context, store *content.Store, c *runtime.Container, dgst digest.Digest, grants spec.Options) (err error) {
	if err := c.CheckOwn(); err != nil {
		return err
	}
	s, err := parse(store, dgst)
	if err != nil {
		return err
	}
	rw, changed := s.parts[typeRW]
	if changed && c.Snapshot == nil && c.Bundle == "" {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "%s has what was changed in a snapshot: the container wants one, on the same image", dgst)
	}
	d, err := c.OpenDir()
	if err != nil {
		return err
	}
	defer d.Close()
	dir, name := disk.Tree(procPath(d)), filepath.Base(c.CheckpointDir())
	if err := dir.RemoveAll(name); err != nil {
		return err
	}
	if err := dir.Mkdir(name, 0o700); err != nil {
		return err
	}
	state, err := dir.OpenDir(name)
	if err != nil {
		return err
	}
	defer state.Close()
	if err := apply(ctx, store, s.parts[typeState].Digest, state); err != nil {
		return err
	}
	bundle := dir
	if c.Bundle != "" {
		bundle = disk.Tree(c.Bundle)
	}
	if fi, err := bundle.Stat("config.json"); errors.Is(err, fs.ErrNotExist) || err == nil && fi.Size() == 0 {
		b, err := read(store, s.parts[typeConfig].Digest)
		if err != nil {
			return err
		}
		granted, err := specification(b, grants)
		if err != nil {
			return fmt.Errorf("checkpoint %s: %w", dgst, err)
		}
		if b, err = json.Marshal(granted); err == nil {
			err = bundle.Replace("config.json", b, 0o600, false)
		}
		if err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if changed && c.Snapshot != nil {
		root, err := c.MountRoot(ctx)
		if err == nil {
			err = apply(ctx, store, rw.Digest, root)
			_ = root.Close()
		}
		if err != nil {
			return errors.Join(err, c.UnmountRoot())
		}
	}
	return nil
}

func procPath(d *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", d.Fd()) }

func apply(ctx context.Context, store *content.Store, dgst digest.Digest, dir *os.File) error {
	if err := content.Validate(dgst); err != nil {
		return err
	}
	f, err := store.File(dgst)
	if err != nil {
		return err
	}
	defer f.Close()
	verifier := dgst.Verifier()
	if _, err := archive.Apply(ctx, procPath(dir), io.TeeReader(f, verifier), archive.Options{Strict: true}); err != nil {
		return fmt.Errorf("%s: %w", dgst, err)
	}
	if !verifier.Verified() {
		return errclass.Errorf(errdefs.ErrDataLoss, "%s is corrupt", dgst)
	}
	return nil
}
