// Dist-index makes indexes of layers, with which single files of a remote image are read.
package main

import (
	"context"
	"io"
	"runtime/debug"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/image"
	"distkit/image/layerindex"
	"distkit/layer/index"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() {
	debug.SetGCPercent(25) // most of the memory is buffers
	c := &cobra.Command{
		Use:   "dist-index [flags] [NAME|DIGEST…|-]",
		Short: "index layers, so that single files can be fetched",
		Args:  cobra.ArbitraryArgs,
	}
	root, namespace := cli.Root(c.Flags()), cli.Namespace(c.Flags())
	platform := c.Flags().String("platform", "", "the `PLATFORM` of an index: os/arch[/variant] (default: this machine's)")
	expect := c.Flags().String("expect-diff-id", "", "fail unless the diff ID of the layer on standard input is `DIGEST`")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "IMAGE")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return filter(c, digest.Digest(*expect))
		}
		if *expect != "" {
			return cli.Usagef("--expect-diff-id is for a layer on standard input")
		}
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		names, err := image.OpenNames(store, *namespace)
		if err != nil {
			return err
		}
		w := image.Walker{Store: store}
		if w.Platform, err = image.ParsePlatform(*platform); err != nil {
			return err
		}
		step := progress.Begin("images")
		defer step.End()
		err = cli.Each(c, args, func(name string) error {
			defer step.Count()
			img, err := w.Target(c.Context(), names, name)
			if err != nil {
				return err
			}
			d, err := layerindex.Make(c.Context(), w, names, img.Target)
			if err != nil {
				return err
			}
			value := struct {
				Digest digest.Digest `json:"digest"`
				Size   int64         `json:"size"`
				Image  string        `json:"image"`
			}{d.Digest, d.Size, name}
			return records.Write(value, d.Digest, cli.Size(d.Size), name)
		})
		step.End()
		if cerr := records.Close(); err == nil {
			err = cerr
		}
		return err
	}
	cli.Main(c)
}

// filter writes an index of the layer on standard input to standard output.
func filter(c *cobra.Command, expect digest.Digest) error {
	if expect != "" && expect.Validate() != nil {
		return cli.Usagef("--expect-diff-id: %q is not a digest", expect)
	}
	if err := cli.Refused(); err != nil {
		return err
	}
	in, err := cli.LayerStdin(c.Context())
	if err != nil {
		return err
	}
	defer in.Close()
	return write(c.Context(), c.OutOrStdout(), in, expect)
}

func write(ctx context.Context, w io.Writer, layer io.Reader, expect digest.Digest) error {
	b, err := index.NewBuilder(ctx, layer, "", "")
	if err != nil {
		return err
	}
	defer b.Close()
	if err := b.End(expect); err != nil {
		return err
	}
	return b.Write(w)
}
