// Package create makes complete containers, with a root filesystem and a configuration, from an image, a directory or a
// checkpoint. A command fills in a [Request] and calls [Request.Container].
package create

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/cmd/internal/checkpoint"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/specflags"
	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/image"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// pasta is run-net's network for ordinary users.
const pasta = "pasta"

// Request describes the container to make.
type Request struct {
	Of     *containers.Flags // select the store and the directory for the state of runs
	Record runtime.Record    // the container's record: ID, labels, runtime
	Spec   spec.Options      // options of its configuration

	Image, Platform string   // image by name or digest; platform "" means this machine's
	Checkpoint      string   // digest of a checkpoint to be restored by the first run
	Driver          string   // driver of its snapshot
	Network         string   // none, host, the path of a namespace, or a network of run-net
	Publish         []string // published ports
	Names           spec.Names
	Secrets         []runtime.Secret

	Warnings io.Writer   // where run-net's warnings go
	Warn     func(error) // tells what a new volume could not be given

	shared *nameFiles // set if it joins another container's network
}

// missing is the error for an image that is not in the store, or not unpacked.
type missing struct{ error }

func (e missing) Unwrap() error { return e.error }

// IsMissing reports whether an error means that the image is not in the store, or not unpacked.
func IsMissing(err error) bool {
	var m missing
	return errors.As(err, &m)
}

// ifNotFound marks err as the error of a missing image if it is NotFound.
func ifNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return missing{err}
	}
	return err
}

// Container makes the container. It checks the whole request before it makes anything.
func (q *Request) Container(ctx context.Context) (*runtime.Container, error) {
	r, o := q.Record, q.Spec
	var err error
	if r.Runtime, err = runtime.Recorded(r.Runtime); err != nil {
		return nil, err
	}
	for k, v := range r.Labels {
		o.Annotations[k] = v
	}
	if o.Rootfs != "" {
		if o.Rootfs, err = realDir(o.Rootfs); err != nil {
			return nil, fmt.Errorf("--rootfs: %w", err)
		}
	}
	all, err := q.Of.Open()
	if err != nil {
		return nil, err
	}
	if q.Checkpoint == "" {
		if err := q.join(all, &r, &o); err != nil {
			return nil, err
		}
		if o.Hostname == "" && o.UTS == "" {
			o.Hostname = r.ID[:min(len(r.ID), 63)]
		}
	} else if len(o.Joins())+len(o.CDI)+len(q.Secrets) > 0 {
		return nil, cli.Usagef("--checkpoint goes on with what was stored: no container:ID, no CDI device and no --secret fits it")
	}
	for _, s := range q.Secrets {
		r.Secrets = append(r.Secrets, s.Name)
	}
	if err := runtime.CheckSecrets(r.Secrets); err != nil {
		return nil, err
	}
	if r.Users, err = q.users(o); err != nil {
		return nil, err
	}
	if r.Volumes, err = volumesOf(o.Mounts); err != nil {
		return nil, err
	}
	own := "run." + r.ID // the name of the container's own network and snapshot
	files, err := q.connect(ctx, own, &r, &o)
	if err != nil {
		return nil, err
	}
	r.Snapshot = &runtime.Snapshot{Driver: cmp.Or(q.Driver, os.Getenv("CONTAINERD_SNAPSHOTTER")), Key: own}
	src, err := q.source(ctx, &r, o)
	defer src.release()
	if err != nil {
		return nil, err
	}
	made, err := all.Create(ctx, r, src.parent, func(c *runtime.Container) error {
		if err := files.write(c); err != nil {
			return err
		}
		if err := c.SetSecrets(q.Secrets); err != nil {
			return err
		}
		o := o
		var err error
		if o.Mounts, err = bindVolumes(o.Mounts, func(m specs.Mount) (string, error) { return q.volume(ctx, all, c, m, o.Rootfs) }); err != nil {
			return err
		}
		return src.complete(c, files.mount(c, o))
	})
	if src.parent != "" && errdefs.IsNotFound(err) && !q.unpacked(ctx, runtime.Snapshot{Driver: r.Snapshot.Driver, Key: src.parent}) {
		err = ifNotFound(err)
	}
	return made, err
}

// users returns the record's Users for the container's user namespace.
func (q *Request) users(o spec.Options) (string, error) {
	switch {
	case !o.UserNS.Own():
		return q.Record.Users, nil
	case q.Image == "":
		return "", errclass.Errorf(errdefs.ErrNotImplemented, "--userns needs an --image, whose files' owners are mapped")
	case o.Host.UserNamespace:
		return "", errclass.Errorf(errdefs.ErrNotImplemented, "--userns: an ordinary user's containers are in a user namespace already")
	case o.UserNS.Auto:
		return runtime.AutoUsers, nil
	}
	return runtime.MappedUsers, nil
}

// volumesOf returns the names of the volumes among mounts.
func volumesOf(mounts []specs.Mount) (names []string, err error) {
	for _, m := range mounts {
		if m.Type != spec.VolumeType {
			continue
		}
		if err := runtime.CheckVolume(m.Source); err != nil {
			return nil, err
		}
		if !slices.Contains(names, m.Source) {
			names = append(names, m.Source)
		}
	}
	return names, nil
}

// source is what a container is made from.
type source struct {
	parent   string // the snapshot of the image's layers, or ""
	complete func(*runtime.Container, spec.Options) error
	release  func() // lets sweeps run again
}

// source finds the image or the checkpoint, and enters it in the record. It also finds mistakes in the options. The
// caller must call release, even after an error.
func (q *Request) source(ctx context.Context, r *runtime.Record, o spec.Options) (src source, err error) {
	src.release = func() {}
	config, from := &spec.Image{}, q.Image
	if q.Image != "" || q.Checkpoint != "" {
		store, release, err := hold(ctx, q.Of.Root())
		if err != nil {
			return src, ifNotFound(err)
		}
		src.release = release
		if q.Checkpoint != "" {
			d, err := checkpoint.Describe(ctx, store, q.Checkpoint, r)
			if err != nil {
				return src, err
			}
			r.Stored = true
			if r.Image != nil && o.Rootfs == "" {
				from = r.Image.Digest
			}
			src.complete = func(c *runtime.Container, o spec.Options) error {
				return checkpoint.Load(ctx, store, c, d, o)
			}
		}
		if from != "" {
			if config, src.parent, err = q.find(ctx, store, from, r); err != nil {
				return src, ifNotFound(err)
			}
		}
	}
	if from == "" {
		r.Snapshot = nil
	}
	if src.complete == nil {
		src.complete = func(c *runtime.Container, o spec.Options) error { return configure(ctx, c, config, o) }
		err = checkOptions(ctx, config, o)
	}
	return src, err
}

// checkOptions finds mistakes in the options before anything is made. Names of users and groups can't be looked up yet,
// because that needs the container's files.
func checkOptions(ctx context.Context, config *spec.Image, o spec.Options) error {
	o.Rootfs, o.User, o.GroupAdd = "", "0", nil
	o.Mounts, _ = bindVolumes(o.Mounts, func(specs.Mount) (string, error) { return "/", nil })
	s, err := spec.New(config, o)
	if err != nil {
		return err
	}
	_, err = specflags.Document(ctx, s, o.CDI)
	return err
}

// join records the containers whose namespaces are to be joined. They must exist.
func (q *Request) join(all *runtime.Containers, r *runtime.Record, o *spec.Options) error {
	o.Network = q.Network
	r.Namespaces = o.Joins()
	for _, kind := range slices.Sorted(maps.Keys(r.Namespaces)) {
		id := r.Namespaces[kind]
		c, err := all.Get(id)
		if err == nil && id == r.ID {
			err = errclass.Errorf(errdefs.ErrInvalidArgument, "it is this container")
		}
		if err == nil {
			err = c.CheckOwn()
		}
		if err == nil && kind == specs.NetworkNamespace {
			var hostname string
			q.shared = &nameFiles{}
			if hostname, q.shared.mounts, err = c.Shared(); o.UTS == "" {
				o.Hostname = cmp.Or(o.Hostname, hostname)
			}
		}
		if err != nil {
			return fmt.Errorf("%s namespace of container %s: %w", kind, id, err)
		}
	}
	return nil
}

// hold opens the store, and keeps sweeps out until release is called: only the container's record, once written, pins
// the image.
func hold(ctx context.Context, root string) (store *content.Store, release func(), err error) {
	if store, err = content.Open(root); err != nil {
		return nil, nil, err
	}
	release, err = layout.Share(ctx, disk.Tree(store.Root()))
	if errors.Is(err, fs.ErrNotExist) {
		err = errclass.Errorf(errdefs.ErrNotFound, "no store at %s", store.Root())
	}
	return store, release, err
}

// unpacked reports whether the snapshot of the image's layers exists.
func (q *Request) unpacked(ctx context.Context, chain runtime.Snapshot) bool {
	_, err := q.Of.Snapshots().Stat(ctx, chain)
	return err == nil || !errdefs.IsNotFound(err)
}

// target finds the image that ref names.
func (q *Request) target(ctx context.Context, store *content.Store, ref string) (w image.Walker, img image.Image, err error) {
	platform, err := image.ParsePlatform(q.Platform)
	if err != nil {
		return w, img, err
	}
	w = image.Walker{Store: store, Platform: platform}
	names, err := image.OpenNames(store, q.Of.Namespace())
	if err == nil {
		img, err = w.Target(ctx, names, ref)
	}
	return w, img, err
}

// Here reports whether the store has the complete image, so that it can be unpacked.
func (q *Request) Here(ctx context.Context) bool {
	store, release, err := hold(ctx, q.Of.Root())
	if err != nil {
		return false
	}
	defer release()
	w, img, err := q.target(ctx, store, q.Image)
	if err != nil {
		return false
	}
	missing, err := w.Missing(ctx, img.Target)
	return err == nil && len(missing) == 0
}

// find finds an image and enters it in the record. It returns the image's configuration and the snapshot of its layers.
func (q *Request) find(ctx context.Context, store *content.Store, ref string, r *runtime.Record) (*spec.Image, string, error) {
	w, img, err := q.target(ctx, store, ref)
	if err != nil {
		return nil, "", err
	}
	is, err := w.Contents(ctx, img.Target)
	switch {
	case err != nil:
		return nil, "", err
	case len(is.Layers) == 0:
		return nil, "", errclass.Errorf(errdefs.ErrNotImplemented, "%s has no layers", ref)
	case r.Image == nil:
		r.Image = &runtime.ImageName{Name: img.Name, Digest: is.Manifest.Digest.String()}
	}
	config, err := spec.ReadImage(bytes.NewReader(is.Config))
	if err == nil {
		r.Healthcheck = config.Config.Healthcheck
	}
	return config, is.Layers[len(is.Layers)-1].ChainID.String(), err
}

// realDir returns a directory's absolute path without symbolic links. In a configuration, a relative path would be
// relative to the container's directory.
func realDir(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}

// connect plans the requested network, and the files that resolve names. A network that run-net makes is entered in the
// record; any other is only in the configuration.
func (q *Request) connect(ctx context.Context, own string, r *runtime.Record, o *spec.Options) (nameFiles, error) {
	name, names := q.Network, q.Names
	names.Hostname = cmp.Or(o.Hostname, r.ID)
	if q.shared != nil {
		if len(q.Publish) > 0 || q.Names.Given() {
			return nameFiles{}, cli.Usagef("--net %s: ports and names are given to the container whose network it is", name)
		}
		return *q.shared, nil
	}
	switch file := strings.HasSuffix(name, ".conf") || strings.HasSuffix(name, ".conflist") || strings.HasSuffix(name, ".json"); {
	case name == "" && len(q.Publish) > 0 && o.Host.UserNamespace:
		name = pasta
	case name == "" && len(q.Publish) > 0:
		name = "bridge"
	case name == "", name == "none", name == "host", strings.Contains(name, "/") && !file:
		if len(q.Publish) > 0 {
			return nameFiles{}, cli.Usagef("--publish goes with a network of run-net, not with --net %s", name)
		}
		o.Network = name
		if files := q.Of.NetworkFiles(name); files != nil && !q.Names.Given() {
			return nameFiles{made: files}, nil
		}
		return newNameFiles(names, name == "host")
	}
	if kind, _, _ := strings.Cut(name, ":"); o.Host.UserNamespace && kind != pasta {
		return nameFiles{}, errclass.Errorf(errdefs.ErrNotImplemented, "--net %s takes root: none, host, pasta and a namespace's path don't", name)
	}
	p, err := q.Of.PlanNetwork(ctx, own, runtime.Connection{Name: name, Ports: q.Publish, Names: names}, q.Warnings)
	if err != nil {
		return nameFiles{}, err
	}
	o.Network, r.Network, r.Connection = p.Path, p.Path, &p.Connection
	return nameFiles{made: p.Files}, nil
}

// configure writes a container's config.json.
func configure(ctx context.Context, c *runtime.Container, img *spec.Image, o spec.Options) error {
	if o.Rootfs == "" {
		o.Rootfs = filepath.Join(c.Dir(), "rootfs")
	}
	s, err := spec.New(img, o)
	if err != nil {
		return err
	}
	b, err := specflags.Document(ctx, s, o.CDI)
	if err != nil {
		return err
	}
	return disk.Tree(c.Dir()).Replace("config.json", b, 0o600, !c.RemoveAtEnd)
}
