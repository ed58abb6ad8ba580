package main

import (
	"context"
	"fmt"
	"os"

	"distkit/image"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newCheck() *cobra.Command {
	c := &cobra.Command{
		Use:   "check [flags] NAME|DIGEST",
		Short: "list which blobs of an image are missing; status 3 if any is",
	}
	unpacked := c.Flags().Bool("unpacked", false, "the platform's layers must be unpacked, too")
	driver := c.Flags().String("snapshotter", "", "with --unpacked: the `DRIVER`, see snap drivers (env CONTAINERD_SNAPSHOTTER)")
	if v := os.Getenv("CONTAINERD_SNAPSHOTTER"); v != "" {
		*driver = v
	}
	var f *flags
	var list func(string) (int, error)
	f, list = listDescriptors(c, func(w image.Walker, ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
		missing, err := w.Missing(ctx, d)
		if err != nil || !*unpacked {
			return missing, err
		}
		layers, err := w.Layers(ctx, d)
		if errdefs.IsNotFound(err) || err == nil && len(layers) == 0 {
			return missing, nil // the manifest or config is missing itself
		}
		if err != nil {
			return missing, err
		}
		chain := layers[len(layers)-1].ChainID
		ok, err := f.unpacked(ctx, *driver, chain)
		if err == nil && !ok {
			missing = append(missing, v1.Descriptor{MediaType: "snapshot", Digest: chain})
		}
		return missing, err
	})
	c.MarkFlagsMutuallyExclusive("all-platforms", "unpacked")
	c.RunE = func(c *cobra.Command, args []string) error {
		missing, err := list(args[0])
		if err == nil && missing > 0 {
			what := "blobs"
			if *unpacked {
				what = "blobs or snapshots"
			}
			err = fmt.Errorf("%s is incomplete: %s that are missing: %d: %w", args[0], what, missing, errdefs.ErrNotFound)
		}
		return err
	}
	return c
}
