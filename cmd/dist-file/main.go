// Dist-file writes files of an image to standard output, without unpacking it.
package main

import (
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/inside"
	"distkit/cmd/internal/remoteimage"
	"distkit/image/look"

	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-file [flags] NAME|DIGEST PATH…",
		Short: "write files of an image to standard output",
		Args:  cobra.MinimumNArgs(2),
	}
	flags := inside.NewFlags(c)
	far := remoteimage.NewFlags(c)
	archive := c.Flags().Bool("tar", false, "write a tar archive of files and of directories with all that is in them")
	c.RunE = func(c *cobra.Command, args []string) error {
		if args[0] == "-" {
			return cli.Usagef("a layer on standard input can be read only once: dist-ls lists it, tar reads its files")
		}
		layers, err := far.Layers(c.Context(), args[0], flags)
		if err != nil {
			return err
		}
		var paths []string
		if !*archive {
			paths = args[1:]
		}
		files, err := look.Open(c.Context(), layers, flags.Memory(), paths...)
		if err != nil {
			return err
		}
		if *archive {
			return files.Tar(c.Context(), args[1:], c.OutOrStdout())
		}
		return cli.Each(c, args[1:], func(p string) error { return files.Cat(c.Context(), p, c.OutOrStdout()) })
	}
	cli.Main(c)
}
