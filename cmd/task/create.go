package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// creation is what the flags of task create say.
type creation struct {
	of                                         *containers.Flags
	set                                        *pflag.FlagSet
	record                                     *containers.NewRecord
	bundle, image, digest, key, parent, driver string
	network, checkpoint                        string
	owner                                      int

	// Of a container that is made from an image, a directory or a checkpoint, complete with its configuration.
	spec          *specflags.Flags
	net, platform string
	publish       []string
	quiet         bool
}

func newCreate(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "create [flags] ID [CMD…]", Short: "make a container, and print its directory", Args: cobra.MinimumNArgs(1)}
	f := c.Flags()
	f.SetInterspersed(false)
	m := &creation{of: o, set: f, record: containers.Record(f), spec: specflags.Register(f)}
	f.StringVar(&m.record.Runtime, "runtime", "", "the OCI runtime's `NAME` or path to run it with")
	f.StringVar(&m.bundle, "bundle", "", "the OCI bundle's `DIR`, where it isn't the container's directory")
	f.StringVar(&m.image, "image", "", "the `NAME` or digest of the image to make it from, whose snapshot is mounted; with --digest, a name to write down")
	f.StringVar(&m.digest, "digest", "", "the `DIGEST` of the manifest or index that the container keeps from dist-gc; its files are made by others")
	f.StringVar(&m.key, "snapshot", "", "the `KEY` of the snapshot that is its root filesystem, which it mounts, keeps from dist-gc, and removes at its own removal")
	f.StringVar(&m.parent, "parent", "", "make that snapshot on the snapshot `PARENT`, and mount it")
	f.StringVar(&m.driver, "snapshotter", "", "the snapshot's `DRIVER`")
	f.StringVar(&m.network, "network", "", "the `PATH` of the network that run-net made for it, and that is removed with it")
	f.StringVar(&m.checkpoint, "checkpoint", "", "the `DIGEST` of the checkpoint that its first run goes on from: its image, runtime and snapshotter unless given")
	f.IntVar(&m.owner, "owner", 0, "the `PID` of the process that is to run it: with --rm it goes if that dies before")
	f.StringVar(&m.net, "net", "", "`NETWORK`: none, host, a namespace's path, or a network that run-net makes, such as bridge (default none)")
	f.StringArrayVarP(&m.publish, "publish", "p", nil, "let a port of the host lead to the container's, by --net bridge: `[IP:]HOST:PORT[/PROTOCOL]` (can be repeated)")
	f.StringVar(&m.platform, "platform", "", "the `PLATFORM` of an index: os/arch[/variant] (default: this machine's)")
	f.BoolVarP(&m.quiet, "quiet", "q", false, "no message if the image is not here, but status 3")
	c.RunE = func(c *cobra.Command, args []string) error {
		made, err := m.create(c, args[0], args[1:])
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.OutOrStdout(), made.Dir())
		return err
	}
	return c
}

// outlined are the flags of a container whose directory others complete.
var outlined = []string{"bundle", "digest", "snapshot", "parent", "network"}

func (m *creation) create(c *cobra.Command, id string, cmd []string) (*runtime.Container, error) {
	r, err := m.record.Get()
	if err != nil {
		return nil, err
	}
	r.ID = id
	if m.owner != 0 {
		p, err := runtime.Identify(m.owner)
		if err != nil {
			return nil, fmt.Errorf("owner: %w", err)
		}
		r.Owner = &p
	}
	outline := m.changed(outlined...)
	switch {
	case outline != "" || m.image == "" && m.checkpoint == "" && !m.set.Changed("rootfs"):
		return m.outline(c, r, cmd, outline)
	case m.image != "" && (m.checkpoint != "" || m.set.Changed("rootfs")):
		return nil, cli.Usagef("--image, --rootfs and --checkpoint exclude each other, but for a --rootfs that a checkpoint had")
	case m.checkpoint != "" && (len(cmd) > 0 || m.platform != "" || m.set.Changed("hostname")):
		return nil, cli.Usagef("--checkpoint goes on with what was stored: no CMD, and no --platform or --hostname, fits it")
	}
	made, err := m.complete(c, r, cmd)
	var missing missingImage
	switch {
	case errors.As(err, &missing) && m.quiet:
		err = cli.Exit(3)
	case errdefs.IsNotFound(err) && missing.error == nil:
		err = cli.ExitWith(1, err) // 3 is for the image alone: whoever gets it fetches that
	}
	return made, err
}

// missingImage is the error of an image that is not here.
type missingImage struct{ error }

func (e missingImage) Unwrap() error { return e.error }

// missing marks the error of an image that is not here.
func missing(err error) error {
	if errdefs.IsNotFound(err) {
		return missingImage{err}
	}
	return err
}

// changed returns the first of these flags that was given.
func (m *creation) changed(names ...string) string {
	for _, n := range names {
		if m.set.Changed(n) {
			return n
		}
	}
	return ""
}

// outline makes a container of which others make the configuration.
func (m *creation) outline(c *cobra.Command, r runtime.Record, cmd []string, because string) (*runtime.Container, error) {
	switch foreign := m.foreign(); {
	case foreign != "" && because == "":
		return nil, cli.Usagef("--%s needs an --image, a --rootfs or a --checkpoint", foreign)
	case foreign != "":
		return nil, cli.Usagef("--%s goes with an image whose files task create finds: not with --%s", foreign, because)
	case len(cmd) > 0:
		return nil, cli.Usagef("one ID is wanted, and flags before it; a CMD needs an --image or a --rootfs")
	case m.image != "" && m.digest == "":
		return nil, cli.Usagef("--image with --%s needs the image's --digest", because)
	case m.driver != "" && m.key == "":
		return nil, cli.Usagef("--snapshotter needs a --snapshot")
	case m.parent != "" && (m.key == "" || m.bundle != ""):
		return nil, cli.Usagef("--parent needs a --snapshot, and no --bundle")
	case m.digest != "":
		r.Image = &runtime.ImageName{Name: m.image, Digest: m.digest}
	}
	if m.key != "" {
		r.Snapshot = &runtime.Snapshot{Driver: m.driver, Key: m.key}
	}
	r.Network = m.network
	if m.checkpoint != "" {
		store, err := content.Open(m.of.Root())
		if err == nil {
			_, err = m.stored(c.Context(), store, &r)
		}
		if err != nil {
			return nil, err
		}
	}
	all, err := m.of.Open()
	if err != nil {
		return nil, err
	}
	if r.Runtime, err = runtime.Recorded(r.Runtime); err != nil {
		return nil, err
	}
	if r.Bundle, err = runtime.Bundle(m.bundle); err != nil {
		return nil, err
	}
	return all.Create(c.Context(), r, m.parent, nil)
}

// foreign returns the first flag that was given and says something of a configuration that is not made here.
func (m *creation) foreign() (name string) {
	mine := pflag.NewFlagSet("", pflag.ContinueOnError)
	specflags.Register(mine)
	m.set.Visit(func(f *pflag.Flag) {
		if name == "" && (mine.Lookup(f.Name) != nil || f.Name == "net" || f.Name == "publish" || f.Name == "platform") {
			name = f.Name
		}
	})
	return name
}

// stored adds to a record what a checkpoint says of the container, and returns the checkpoint's digest.
func (m *creation) stored(ctx context.Context, store *content.Store, r *runtime.Record) (digest.Digest, error) {
	d, err := digest.Parse(m.checkpoint)
	if err != nil {
		return "", cli.Usagef("%q is no digest: %v", m.checkpoint, err)
	}
	if err := runtime.CheckCriu(ctx); err != nil {
		return "", err
	}
	return d, checkpoint.Describe(store, d, r)
}

// complete makes a container with its root filesystem and its configuration. All flags are checked before.
func (m *creation) complete(c *cobra.Command, r runtime.Record, cmd []string) (*runtime.Container, error) {
	ctx := c.Context()
	o, err := m.spec.Options()
	if err != nil {
		return nil, err
	}
	if r.Runtime, err = runtime.Recorded(r.Runtime); err != nil {
		return nil, err
	}
	o.Args = cmd
	if o.Hostname == "" && m.checkpoint == "" {
		o.Hostname = r.ID[:min(len(r.ID), 63)]
	}
	for k, v := range r.Labels {
		o.Annotations[k] = v
	}
	if m.set.Changed("rootfs") {
		if o.Rootfs, err = rootfs(o.Rootfs); err != nil {
			return nil, err
		}
	}
	all, err := m.of.Open()
	if err != nil {
		return nil, err
	}
	if err := m.connect(c, &r, &o); err != nil {
		return nil, err
	}
	var config *spec.Image
	r.Snapshot = &runtime.Snapshot{Driver: cmp.Or(m.driver, os.Getenv("CONTAINERD_SNAPSHOTTER")), Key: "run." + r.ID}
	parent, from := "", m.image
	var load func(*runtime.Container) error
	if m.image != "" || m.checkpoint != "" {
		store, err := content.Open(m.of.Root())
		if err != nil {
			return nil, missing(err)
		}
		// A sweep sees the container's record, or has ended before its image is looked for.
		release, err := layout.Share(ctx, disk.Tree(store.Root()))
		if errors.Is(err, fs.ErrNotExist) {
			err = errclass.As(err, errdefs.ErrNotFound)
		}
		if err != nil {
			return nil, missing(err)
		}
		defer release()
		if m.checkpoint != "" {
			d, err := m.stored(ctx, store, &r)
			if err != nil {
				return nil, err
			}
			r.Stored = true
			if r.Image != nil && o.Rootfs == "" {
				from = r.Image.Digest
			}
			load = func(c *runtime.Container) error {
				_, err := checkpoint.Load(ctx, store, m.of.Snapshots(), c, d, o)
				return err
			}
		}
		if from != "" {
			if config, parent, err = m.find(ctx, store, from, &r); err != nil {
				return nil, missing(err)
			}
		}
	}
	if from == "" {
		r.Snapshot = nil
	}
	if load == nil {
		if config == nil {
			config = &spec.Image{}
		}
		// What is wrong with the flags is found before anything is made. Names of users are looked up in the container's files.
		check := o
		check.Rootfs, check.User = "", "0"
		if _, err := spec.New(config, check); err != nil {
			return nil, err
		}
		load = func(c *runtime.Container) error { return configure(c, config, o) }
	}
	made, err := all.Create(ctx, r, parent, load)
	if parent != "" && errdefs.IsNotFound(err) && !m.unpacked(ctx, runtime.Snapshot{Driver: r.Snapshot.Driver, Key: parent}) {
		err = missing(err)
	}
	return made, err
}

// unpacked reports whether the snapshot of an image's layers is there.
func (m *creation) unpacked(ctx context.Context, chain runtime.Snapshot) bool {
	_, err := m.of.Snapshots().Stat(ctx, chain)
	return err == nil || !errdefs.IsNotFound(err)
}

// find finds an image, and adds it to the record. It returns the image's configuration and the snapshot of its layers.
func (m *creation) find(ctx context.Context, store *content.Store, ref string, r *runtime.Record) (*spec.Image, string, error) {
	platform, err := image.ParsePlatform(m.platform)
	if err != nil {
		return nil, "", err
	}
	w := image.Walker{Store: store, Platform: platform}
	names, err := image.OpenNames(store, m.of.Namespace())
	if err != nil {
		return nil, "", err
	}
	img, err := w.Target(ctx, names, ref)
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
	return config, is.Layers[len(is.Layers)-1].ChainID.String(), err
}

// rootfs is a root filesystem's directory, absolute, so that it is not taken for one in the container's directory.
func rootfs(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", fmt.Errorf("--rootfs: %w", err)
	}
	return dir, nil
}

// connect asks for the network that --net names. What is not one of run-net's is for the specification alone.
func (m *creation) connect(c *cobra.Command, r *runtime.Record, o *spec.Options) error {
	name := m.net
	switch file := strings.HasSuffix(name, ".conf") || strings.HasSuffix(name, ".conflist") || strings.HasSuffix(name, ".json"); {
	case name == "" && len(m.publish) > 0:
		name = "bridge"
	case name == "", name == "none", name == "host", strings.Contains(name, "/") && !file:
		if len(m.publish) > 0 {
			return cli.Usagef("--publish goes with a network of run-net, not with --net %s", name)
		}
		o.Network = name
		return nil
	}
	if o.Host.UserNamespace {
		return errclass.Errorf(errdefs.ErrNotImplemented, "--net %s takes root: none, host and a namespace's path don't", name)
	}
	p, err := m.of.PlanNetwork(c.Context(), "run."+r.ID, name, m.publish, c.ErrOrStderr())
	if err != nil {
		return err
	}
	o.Network, r.Network, r.Connection = p.Path, p.Path, &p.Connection
	if p.ResolvConf != "" { // before the caller's own mounts, of which the last counts
		o.Mounts = append([]specs.Mount{{Destination: "/etc/resolv.conf", Type: "bind", Source: p.ResolvConf, Options: []string{"rbind", "rprivate", "ro"}}}, o.Mounts...)
	}
	return nil
}

// configure writes a container's config.json.
func configure(c *runtime.Container, img *spec.Image, o spec.Options) error {
	if o.Rootfs == "" {
		o.Rootfs = filepath.Join(c.Dir(), "rootfs")
	}
	s, err := spec.New(img, o)
	if err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return disk.Tree(c.Dir()).Replace("config.json", append(b, '\n'), 0o600, !c.RemoveAtEnd)
}
