// Dist-erofs writes an EROFS image of layers.
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/erofs"
	"distkit/errclass"
)

func main() { cli.Main(newCmd()) }

func newCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-erofs [flags] [LAYER...]",
		Short: "make an EROFS image from layers",
		Args:  cobra.ArbitraryArgs,
	}
	output := c.Flags().StringP("output", "o", "", "write the image to `FILE`, which appears when it is whole")
	index := c.Flags().Bool("index", false, "leave out files' data: they are in the plain layers")
	form := c.Flags().String("whiteouts", "remove", "what becomes of whiteouts: `FORM` is remove or overlay")
	expect := c.Flags().StringArray("expect-diff-id", nil, "fail unless the next layer's diff ID is `DIGEST`")
	maxBytes := c.Flags().Uint64("max-bytes", 0, "fail where an uncompressed layer, or its sparse files, has more than `N` bytes")
	maxEntries := c.Flags().Uint32("max-entries", 0, "fail where the layers make more than `N` files and directories")
	maxMemory := c.Flags().Uint64("max-memory", 1<<30, "fail where the tree of files takes more than `N` bytes of memory")
	c.RunE = func(c *cobra.Command, layers []string) error {
		if *form != "remove" && *form != "overlay" {
			return cli.Usagef("--whiteouts: %q is not one of remove, overlay", *form)
		}
		if *form == "overlay" && len(layers) > 1 {
			return cli.Usagef("--whiteouts overlay: is for one layer")
		}
		if len(layers) == 0 {
			layers = []string{"-"}
		}
		if len(*expect) > 0 && len(*expect) != len(layers) {
			return cli.Usagef("--expect-diff-id: %d for %d layers", len(*expect), len(layers))
		}
		for _, d := range *expect {
			if d := digest.Digest(d); d.Validate() != nil || d.Algorithm() != digest.SHA256 {
				return cli.Usagef("--expect-diff-id: %q is not a SHA-256 digest", d)
			}
		}
		if *output == "" {
			if err := cli.Refused("output"); err != nil {
				return err
			}
		}
		opts := erofs.Options{Index: *index, Overlay: *form == "overlay",
			MaxBytes: int64(min(*maxBytes, math.MaxInt64)), MaxEntries: int64(*maxEntries), MaxMemory: int64(min(*maxMemory, math.MaxInt64))}
		if *output == "" {
			return write(c, c.OutOrStdout(), layers, *expect, opts)
		}
		return cli.CreateOutput(c, *output, func(f *os.File, dir string) error {
			opts.Scratch = dir
			return write(c, f, layers, *expect, opts)
		})
	}
	return c
}

// write writes an image of layers to w, and reports what it can't hold.
func write(c *cobra.Command, w io.Writer, layers, expect []string, opts erofs.Options) error {
	b := erofs.NewBuilder(opts)
	defer b.Close()
	step := progress.Begin("layers")
	defer step.End()
	step.Total(0, int64(len(layers)))
	for i, l := range layers {
		var diffID digest.Digest
		if len(expect) > 0 {
			diffID = digest.Digest(expect[i])
		}
		if err := add(c, b, l, diffID, step); err != nil {
			return fmt.Errorf("layer %s: %w", l, err)
		}
		step.Count()
	}
	if err := b.Write(c.Context(), w); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if len(b.Unset()) > 0 {
		cli.Report(c, fmt.Errorf("left out %s", cli.Counts(b.Unset())))
	}
	return nil
}

// add adds a layer from a file or standard input.
func add(c *cobra.Command, b *erofs.Builder, name string, expect digest.Digest, step *progress.Step) error {
	var in io.ReadCloser
	var err error
	if name == "-" {
		in, err = cli.LayerStdin(c.Context())
	} else {
		in, err = os.Open(name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return errclass.As(err, errdefs.ErrNotFound)
	} else if err != nil {
		return err
	}
	defer in.Close()
	return b.Add(c.Context(), step.Reader(in), expect)
}
