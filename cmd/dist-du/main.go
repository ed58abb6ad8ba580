// Dist-du tells how many bytes the files of an image take, without unpacking it.
package main

import (
	"math"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/inside"
	"distkit/image/look"

	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-du [flags] NAME|DIGEST|-",
		Short: "show how much space the files of an image take",
		Args:  cobra.ExactArgs(1),
	}
	flags := inside.NewFlags(c)
	files := c.Flags().BoolP("all", "a", false, "list files too, not directories alone")
	depth := c.Flags().IntP("max-depth", "d", math.MaxInt, "list directories at most `N` levels below the root")
	c.Flags().Lookup("max-depth").DefValue = "0" // hide the default from help
	byLayer := c.Flags().Bool("layers", false, "list what each layer takes, and wastes: what is overwritten or deleted later")
	wasted := c.Flags().Bool("wasted", false, "list the files that are overwritten or deleted later")
	duplicates := c.Flags().Bool("duplicates", false, "list the files whose content another file has too")
	ncdu := c.Flags().Bool("ncdu", false, "print all as ncdu -f reads it")
	c.MarkFlagsMutuallyExclusive("layers", "wasted", "duplicates", "ncdu", "all")
	c.MarkFlagsMutuallyExclusive("layers", "wasted", "duplicates", "ncdu", "max-depth")
	records := cli.NewRecords(c, "PATH", "BYTES", "FILES")
	c.RunE = func(c *cobra.Command, args []string) error {
		layers, err := flags.Layers(c.Context(), args[0])
		if err != nil {
			return err
		}
		opts := look.UsageOptions{MaxMemory: flags.Memory(), Hash: *duplicates}
		var failed error
		if *wasted {
			records.Columns("PATH", "SIZE", "LAYER", "BY")
			opts.Wasted = func(w look.Waste) {
				if failed == nil {
					failed = records.Write(w, cli.Name(w.Path), cli.Size(w.Size), w.Layer, w.By)
				}
			}
		}
		u, err := look.Measure(c.Context(), layers, opts)
		switch {
		case err != nil:
		case *wasted:
			err = failed
		case *byLayer:
			err = printLayers(records, u)
		case *duplicates:
			err = printDuplicates(records, u)
		case *ncdu:
			return export(c.OutOrStdout(), args[0], u)
		default:
			err = printFiles(records, u, *depth, *files)
		}
		if cerr := records.Close(); err == nil {
			err = cerr
		}
		return err
	}
	cli.Main(c)
}

func printLayers(records *cli.Records, u *look.Usage) error {
	records.Columns("LAYER", "SIZE", "BYTES", "WASTED", "FILES", "DIGEST")
	for _, l := range u.Layers {
		if err := records.Write(l, l.Layer, cli.Size(l.Size), cli.Size(l.Bytes), cli.Size(l.Wasted), l.Files, l.Digest); err != nil {
			return err
		}
	}
	return nil
}

func printDuplicates(records *cli.Records, u *look.Usage) error {
	records.Columns("PATH", "SIZE", "LAYER", "CONTENT")
	list, err := u.Duplicates()
	for _, d := range list {
		if err := records.Write(d, cli.Name(d.Path), cli.Size(d.Size), d.Layer, d.Content); err != nil {
			return err
		}
	}
	return err
}

// printFiles prints directories after their contents, like du(1).
func printFiles(records *cli.Records, u *look.Usage, depth int, files bool) error {
	write := func(f *look.FileUsage) error {
		if f.Path != "/" && strings.Count(f.Path, "/") > depth {
			return nil
		}
		return records.Write(f, cli.Name(f.Path), cli.Size(f.Bytes), f.Files)
	}
	return u.Walk(func(f *look.FileUsage) error {
		if f.Dir || !files {
			return nil
		}
		return write(f)
	}, write)
}
