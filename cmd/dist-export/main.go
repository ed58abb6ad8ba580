// Dist-export writes images of the store to standard output as an archive.
package main

import (
	"os"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"
	"distkit/image/transfer"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-export [flags] NAME…|-",
		Short: "write images to standard output, as an OCI archive that docker takes too",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	platform := f.String("platform", "", "of an index, write the manifest of this `PLATFORM`, os/arch[/variant]")
	all := f.Bool("all-platforms", false, "write all of an index, or fail")
	sparse := f.Bool("sparse", false, "write an index with those of its manifests that are here")
	f.BoolP("zero", "z", false, "names on standard input end with NUL instead of newline")
	c.MarkFlagsMutuallyExclusive("platform", "all-platforms", "sparse")
	c.RunE = func(c *cobra.Command, args []string) error {
		if _, tty := cli.IsTerminal(os.Stdout); tty {
			return cli.Usagef("standard output is a terminal: redirect it to a file or a pipe")
		}
		if f.Changed("platform") && *platform == "" {
			return cli.Usagef("--platform is empty")
		}
		var o transfer.ExportOptions
		switch {
		case *all:
			o.Select = transfer.All
		case *sparse:
			o.Select = transfer.Sparse
		case f.Changed("platform"):
			o.Select = transfer.One
		}
		var err error
		if f.Changed("platform") && *platform == "" {
			return cli.Usagef("--platform is empty")
		}
		if o.Platform, err = image.ParsePlatform(*platform); err != nil {
			return err
		}
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		names, err := image.OpenNames(store, *namespace)
		if err != nil {
			return err
		}
		var images []image.Image
		err = cli.Each(c, args, func(name string) error {
			img, err := names.Get(name)
			images = append(images, img)
			return err
		})
		if err != nil {
			return err // an archive has all of them, or is not begun
		}
		return transfer.Export(c.Context(), store, c.OutOrStdout(), images, o)
	}
	return c
}
