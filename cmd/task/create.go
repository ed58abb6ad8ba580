package main

import (
	"fmt"

	"distkit/cmd/internal/checkpoint"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/create"
	"distkit/cmd/internal/specflags"
	"distkit/content"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// creation holds the flags of task create.
type creation struct {
	of                                         *containers.Flags
	set                                        *pflag.FlagSet // all flags
	record                                     *containers.NewRecord
	bundle, image, digest, key, parent, driver string
	network, checkpoint                        string
	owner                                      int

	// Only for a container that task create makes complete, from an image, a directory or a checkpoint.
	complete      *pflag.FlagSet // all of them except --quiet
	spec          *specflags.Flags
	net, platform string
	publish       []string
	names         *spec.Names
	secrets       *create.SecretFlags
	quiet         bool
}

func newCreate(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "create [flags] ID [CMD…]", Short: "make a container, and print its directory", Args: cobra.MinimumNArgs(1)}
	f, complete := c.Flags(), pflag.NewFlagSet("", pflag.ContinueOnError)
	f.SetInterspersed(false)
	m := &creation{of: o, set: f, record: containers.Record(f), complete: complete, spec: specflags.Register(complete), names: specflags.Names(complete), secrets: create.Secrets(complete)}
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
	networkFlags(complete, &m.net, &m.publish)
	complete.StringVar(&m.platform, "platform", "", "the `PLATFORM` of an index: os/arch[/variant] (default: this machine's)")
	f.AddFlagSet(complete)
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

// networkFlags registers --net and --publish.
func networkFlags(f *pflag.FlagSet, net *string, publish *[]string) {
	f.StringVar(net, "net", "", "`NETWORK`: none, host, a namespace's path, or a network that run-net makes, such as bridge, or pasta for an ordinary user (default none)")
	f.StringArrayVarP(publish, "publish", "p", nil, "let a port of the host lead to the container's, by --net bridge, or pasta for an ordinary user: `[IP:]HOST:PORT[/PROTOCOL]` (can be repeated)")
}

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
	outline := m.outlined()
	switch {
	case outline != "" || m.image == "" && m.checkpoint == "" && !m.set.Changed("rootfs"):
		return m.outline(c, r, cmd, outline)
	case m.image != "" && (m.checkpoint != "" || m.set.Changed("rootfs")):
		return nil, cli.Usagef("--image, --rootfs and --checkpoint exclude each other, but for a --rootfs that a checkpoint had")
	case m.checkpoint != "" && (len(cmd) > 0 || m.platform != "" || m.set.Changed("hostname")):
		return nil, cli.Usagef("--checkpoint goes on with what was stored: no CMD, and no --platform or --hostname, fits it")
	}
	made, err := m.whole(c, r, cmd)
	switch missing := create.IsMissing(err); {
	case missing && m.quiet:
		err = cli.Exit(3)
	case !missing && errdefs.IsNotFound(err):
		err = cli.ExitWith(1, err) // only a missing image may give 3, since callers then fetch it
	}
	return made, err
}

// whole makes a container with a root filesystem and a configuration.
func (m *creation) whole(c *cobra.Command, r runtime.Record, cmd []string) (*runtime.Container, error) {
	o, err := m.spec.Options()
	if err != nil {
		return nil, err
	}
	o.Args = cmd
	secrets, err := m.secrets.Read(c.InOrStdin())
	if err != nil {
		return nil, err
	}
	q := create.Request{
		Of: m.of, Record: r, Spec: o,
		Image: m.image, Platform: m.platform, Checkpoint: m.checkpoint, Driver: m.driver,
		Network: m.net, Publish: m.publish, Names: *m.names, Secrets: secrets, Warnings: c.ErrOrStderr(), Warn: func(err error) { cli.Report(c, err) },
	}
	return q.Container(c.Context())
}

// outlined returns the first given flag which says that the caller completes the container's directory, or "".
func (m *creation) outlined() string {
	for _, n := range []string{"bundle", "digest", "snapshot", "parent", "network"} {
		if m.set.Changed(n) {
			return n
		}
	}
	return ""
}

// outline makes a container that the caller completes. because is the flag that says so, or "".
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
			_, err = checkpoint.Describe(c.Context(), store, m.checkpoint, &r)
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

// foreign returns the first given flag that is only for complete containers, or "".
func (m *creation) foreign() (name string) {
	m.complete.VisitAll(func(f *pflag.Flag) {
		if name == "" && f.Changed {
			name = f.Name
		}
	})
	return name
}
