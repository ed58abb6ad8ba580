// Dist-import stores the images of an archive on standard input, or of a directory.
package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/gate"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/image"
	"distkit/image/transfer"
	"distkit/refname"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Name   string        `json:"name"`
	Target v1.Descriptor `json:"target"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-import [flags] [DIR|-]",
		Short: "store the images of an archive or a directory",
		Args:  cobra.MaximumNArgs(1),
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	var o transfer.ImportOptions
	f.StringVar(&o.Name, "name", "", "the `NAME` of the archive's one image, whatever it is called there")
	f.StringVar(&o.BaseName, "base-name", "", "the `NAME` before the tag of images that have a tag alone")
	f.StringArrayVar(&o.Only, "only", nil, "take this image alone: its `NAME` or tag in the archive, or its digest; may be repeated")
	list := f.Bool("list", false, "list the images, and store nothing")
	referrers, verify := cli.ReferrersFlag(f, "take"), gate.Flag(f)
	platform := f.String("platform", "", "name the manifest of this `PLATFORM`, os/arch[/variant], instead of an index")
	all := f.Bool("all-platforms", false, "fail unless all of an index is there")
	c.MarkFlagsMutuallyExclusive("platform", "all-platforms")
	c.MarkFlagsMutuallyExclusive("name", "base-name")
	c.MarkFlagsMutuallyExclusive("list", "verify")
	c.MarkFlagsMutuallyExclusive("list", "referrers")
	out := cli.NewRecords(c, "NAME", "DIGEST")
	c.RunE = func(c *cobra.Command, args []string) error {
		for _, name := range []string{"name", "base-name", "platform"} {
			if f.Changed(name) && f.Lookup(name).Value.String() == "" {
				return cli.Usagef("--%s is empty", name)
			}
		}
		o.Name, o.BaseName = refname.Normalize(o.Name), refname.Normalize(o.BaseName)
		switch {
		case *all:
			o.Select = transfer.All
		case *platform != "":
			p, err := image.ParsePlatform(*platform)
			if err != nil {
				return err
			}
			o.Select, o.Platform = transfer.One, p
		}
		var err error
		if o.ArtifactTypes, o.Referrers, err = referrers.Wanted(); err != nil {
			return err
		}
		o.Ignored = func(n int) {
			cli.Report(c, fmt.Errorf("%d manifests are left out: what they refer to is not among the images", n))
		}
		from, done, err := source(c.Context(), args)
		if err != nil {
			return err
		}
		defer done()
		var images []image.Image
		if *list {
			images, err = transfer.List(c.Context(), from, o)
		} else {
			images, err = load(c.Context(), *root, gate.Gate{Command: *verify, Namespace: *namespace}, from, o)
		}
		if err != nil {
			return err
		}
		for _, img := range images {
			if err := out.Write(record{img.Name, img.Target}, img.Name, img.Target.Digest); err != nil {
				return err
			}
		}
		return out.Close()
	}
	return c
}

// source returns the archive on standard input, or the directory in the argument.
func source(ctx context.Context, args []string) (from transfer.Source, done func(), err error) {
	if len(args) == 1 && args[0] != "-" {
		fi, err := os.Stat(args[0])
		if err == nil && !fi.IsDir() || errors.Is(err, fs.ErrNotExist) {
			return nil, nil, cli.Usagef("%q is no directory; archives are read from standard input: dist-import < %[1]s", args[0])
		}
		return transfer.Dir(args[0]), func() {}, err
	}
	if _, tty := cli.IsTerminal(os.Stdin); tty {
		return nil, nil, cli.Usagef("standard input is a terminal: an archive is needed")
	}
	in, err := cli.Stdin(ctx)
	if err != nil {
		return nil, nil, err
	}
	step := progress.Begin("")
	if info, err := os.Stdin.Stat(); err == nil && info.Mode().IsRegular() {
		step.Total(info.Size(), 0)
	}
	return transfer.Stream(step.Reader(in)), func() {
		step.End()
		_ = in.Close()
	}, nil
}

func load(ctx context.Context, root string, g gate.Gate, from transfer.Source, o transfer.ImportOptions) ([]image.Image, error) {
	// An archive with tens of thousands of names makes much short-lived garbage; blobs, which take the time, make none.
	debug.SetGCPercent(30)
	store, err := content.Open(root)
	if err != nil {
		return nil, err
	}
	names, err := image.OpenNames(store, g.Namespace)
	if err != nil {
		return nil, err
	}
	// Imported objects have no name at first, so the store is held until this process exits. It is created when the
	// archive's first entry has come.
	g.Store = store
	held := func(ctx context.Context, f func(*tar.Header, io.Reader) error) error {
		return from(ctx, func(h *tar.Header, body io.Reader) error {
			if g.Hold == "" {
				var err error
				if g.Hold, err = store.Hold(ctx); err != nil {
					return err
				}
			}
			return f(h, body)
		})
	}
	if g.Command != "" {
		o.Gate = func(ctx context.Context, images []image.Image) error {
			for _, img := range images {
				if err := g.Check(ctx, img.Name, img.Target.Digest); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return transfer.Import(ctx, store, names, held, o)
}
