// Dist-import stores the images of an archive on standard input.
package main

import (
	"os"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"
	"distkit/image/transfer"

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
		Use:   "dist-import [flags] [-]",
		Short: "store and name the images of a docker-save or OCI archive on standard input",
		Args:  cobra.MaximumNArgs(1),
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	var o transfer.ImportOptions
	f.StringVar(&o.Name, "name", "", "the `NAME` of the archive's one image, whatever it is called there")
	f.StringVar(&o.BaseName, "base-name", "", "the `NAME` before the tag of images that have a tag alone")
	platform := f.String("platform", "", "name the manifest of this `PLATFORM`, os/arch[/variant], instead of an index")
	all := f.Bool("all-platforms", false, "fail unless all of an index is there")
	c.MarkFlagsMutuallyExclusive("platform", "all-platforms")
	c.MarkFlagsMutuallyExclusive("name", "base-name")
	out := cli.NewRecords(c, "NAME", "DIGEST")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 1 && args[0] != "-" {
			return cli.Usagef("archives are read from standard input: dist-import < %s", args[0])
		}
		for _, name := range []string{"name", "base-name", "platform"} {
			if f.Changed(name) && f.Lookup(name).Value.String() == "" {
				return cli.Usagef("--%s is empty", name)
			}
		}
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
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		names, err := image.OpenNames(store, *namespace)
		if err != nil {
			return err
		}
		if _, tty := cli.IsTerminal(os.Stdin); tty {
			return cli.Usagef("standard input is a terminal: an archive is needed")
		}
		in, err := cli.Stdin(c.Context())
		if err != nil {
			return err
		}
		defer in.Close()
		// For as long as this process lives: what has come has no name yet.
		if _, err := store.Hold(c.Context()); err != nil {
			return err
		}
		images, err := transfer.Import(c.Context(), store, names, in, o)
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
