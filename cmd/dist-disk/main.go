// Dist-disk writes an image of the store as one file: a file system, or an archive of it.
package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/erofs"
	"distkit/errclass"
	"distkit/image"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-disk [flags] NAME|DIGEST",
		Short: "write an image as one file: a file system or an archive",
		Args:  cobra.ExactArgs(1),
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	platform := f.String("platform", "", "the `PLATFORM` of an index: os/arch[/variant] (default: this machine's)")
	output := f.StringP("output", "o", "", "write to `FILE`, which appears when it is whole")
	name := f.String("format", "erofs", "the `FORMAT` of the file: "+formatNames())
	compress := f.String("compress", "", "compress files' data by `METHOD`, one of the format's")
	size := f.String("size", "", "make an ext4 file system of `N` bytes, or with k, m, g or t, that has a journal (default: what the files need)")
	strict := f.Bool("strict", false, "fail where the format can't hold an attribute, a device or a time")
	maxBytes := f.Uint64("max-bytes", 0, "fail where an uncompressed layer, or its sparse files, has more than `N` bytes")
	maxEntries := f.Uint32("max-entries", 0, "fail where the layers make more than `N` files and directories")
	maxMemory := f.Uint64("max-memory", 1<<30, "fail where the tree of files takes more than `N` bytes of memory")
	c.RunE = func(c *cobra.Command, args []string) error {
		form, ok := formats[*name]
		if !ok {
			return cli.Usagef("--format: %q is not one of %s", *name, formatNames())
		}
		s := settings{format: *name, compress: *compress}
		if s.compress != "" && !slices.Contains(form.methods, s.compress) {
			return cli.Usagef("--compress: %s takes %s", *name, strings.Join(append(form.methods, "no other method"), ", "))
		}
		var err error
		if s.size, err = parseSize(*size); err != nil {
			return err
		} else if s.size > 0 && !form.sized {
			return cli.Usagef("--size is for ext4")
		}
		if *output == "" {
			if err := cli.Refused("output"); err != nil {
				return err
			}
		}
		if err := s.lookup(c.Context()); err != nil {
			return err
		}
		store, layers, err := find(c.Context(), *root, *namespace, *platform, args[0])
		if err != nil {
			return err
		}
		opts := erofs.Options{Strict: *strict, MaxBytes: int64(min(*maxBytes, math.MaxInt64)), MaxEntries: int64(*maxEntries), MaxMemory: int64(min(*maxMemory, math.MaxInt64))}
		step := progress.Begin("layers")
		defer step.End()
		step.Total(0, int64(len(layers)))
		make := func(w io.Writer) error {
			b := erofs.NewBuilder(opts)
			defer b.Close()
			for _, l := range layers {
				if err := add(c.Context(), b, store, l); err != nil {
					return fmt.Errorf("layer %s: %w", l.Digest, err)
				}
				step.Count()
			}
			s.scratch = opts.Scratch
			if err := s.write(c.Context(), step.Writer(w), b); err != nil {
				return fmt.Errorf("write %s: %w", *name, err)
			}
			if len(b.Unset()) > 0 {
				cli.Report(c, fmt.Errorf("left out %s", cli.Counts(b.Unset())))
			}
			return nil
		}
		if *output == "" {
			return make(c.OutOrStdout())
		}
		return cli.CreateOutput(c, *output, func(f *os.File, dir string) error {
			opts.Scratch = dir
			return make(f)
		})
	}
	return c
}

// find returns the layers of an image. There is at least one.
func find(ctx context.Context, root, namespace, platform, ref string) (*content.Store, []image.Layer, error) {
	store, err := content.Open(root)
	if err != nil {
		return nil, nil, err
	}
	names, err := image.OpenNames(store, namespace)
	if err != nil {
		return nil, nil, err
	}
	w := image.Walker{Store: store}
	if w.Platform, err = image.ParsePlatform(platform); err != nil {
		return nil, nil, err
	}
	img, err := w.Target(ctx, names, ref)
	if err != nil {
		return nil, nil, err
	}
	layers, err := w.Layers(ctx, img.Target)
	if err != nil {
		return nil, nil, err
	}
	if len(layers) == 0 {
		return nil, nil, errdefs.ErrNotImplemented.WithMessage(ref + " has no layers")
	}
	for _, l := range layers {
		if l.DiffID.Algorithm() != digest.SHA256 {
			return nil, nil, errclass.Errorf(errdefs.ErrNotImplemented, "diff ID %s: only SHA-256 is supported", l.DiffID)
		}
		if _, err := store.Size(l.Digest); err != nil {
			return nil, nil, err
		}
	}
	return store, layers, nil
}

// add adds a layer of the store.
func add(ctx context.Context, b *erofs.Builder, store *content.Store, l image.Layer) error {
	f, err := store.File(l.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	return b.Add(ctx, f.File, l.DiffID)
}

var sizes = regexp.MustCompile(`^([0-9]{1,15})([kmgt]?)$`)

// parseSize parses a number of bytes with an optional binary unit k, m, g or t. "" is 0.
func parseSize(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	m := sizes.FindStringSubmatch(strings.ToLower(s))
	if m == nil {
		return 0, cli.Usagef("--size: %q is not a number of bytes with k, m, g or t", s)
	}
	n, _ := strconv.ParseInt(m[1], 10, 64) // the pattern has few digits
	for range strings.Index(" kmgt", cmp.Or(m[2], " ")) {
		n = min(n<<10, 1<<50)
	}
	if n >= 1<<44 { // the number of 4 KiB blocks has 32 bits
		return 0, cli.Usagef("--size: %s is not less than 16t", s)
	}
	if n < 1<<20 {
		return 0, cli.Usagef("--size: %s is less than 1m", s)
	}
	return n, nil
}
