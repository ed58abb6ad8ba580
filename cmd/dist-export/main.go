// Dist-export writes images of the store to standard output as an archive, or to a directory.
package main

import (
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/image"
	"distkit/image/transfer"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-export [flags] NAME|DIGEST…|-",
		Short: "write images as an archive, or to a directory",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	platform := f.String("platform", "", "of an index, write the manifest of this `PLATFORM`, os/arch[/variant]")
	all := f.Bool("all-platforms", false, "write all of an index, or fail")
	sparse := f.Bool("sparse", false, "write an index with those of its manifests that are here")
	format := f.String("format", "both", "the `FORMAT` of the archive: both, oci or docker")
	dir := f.String("dir", "", "write an image layout to this `DIR` instead of an archive")
	referrers := cli.ReferrersFlag(f, "write")
	f.BoolP("zero", "z", false, "names on standard input end with NUL instead of newline")
	c.MarkFlagsMutuallyExclusive("platform", "all-platforms", "sparse")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *dir == "" {
			if err := cli.Refused("dir"); err != nil {
				return err
			}
		}
		for _, name := range []string{"platform", "dir"} {
			if f.Changed(name) && f.Lookup(name).Value.String() == "" {
				return cli.Usagef("--%s is empty", name)
			}
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
		if o.Format, err = transfer.ParseFormat(*format); err != nil {
			return err
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
		types, wanted, err := referrers.Wanted()
		if err != nil {
			return err
		}
		if wanted {
			if o.Format == transfer.Docker {
				return cli.Usagef("docker's format has no --referrers")
			}
			o.ArtifactTypes = types
			if o.Referrers, err = names.ReferrersOf(); err != nil {
				return err
			}
		}
		images, err := lookup(c, args, store, names)
		if err != nil {
			return err // an archive has all of them, or is not begun
		}
		step := progress.Begin("")
		defer step.End()
		if *dir != "" {
			return transfer.ExportDir(c.Context(), store, *dir, images, o)
		}
		return transfer.Export(c.Context(), store, step.Writer(c.OutOrStdout()), images, o)
	}
	return c
}

// lookup finds the images with these names and digests.
func lookup(c *cobra.Command, args []string, store *content.Store, names *image.Names) (images []image.Image, err error) {
	finder := image.Finder{Names: names}
	err = cli.Each(c, args, func(object string) error {
		img, err := finder.Find(c.Context(), object)
		if err == nil && img.Name == "" {
			img.Target, err = image.Walker{Store: store}.Describe(c.Context(), img.Target.Digest)
		}
		images = append(images, img)
		return err
	})
	return images, err
}
