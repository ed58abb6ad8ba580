package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func newManifest() *cobra.Command {
	c := &cobra.Command{
		Use:   "manifest [flags] NAME|DIGEST",
		Short: "Print the descriptor of the platform's manifest",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	quiet := c.Flags().BoolP("quiet", "q", false, "print its digest alone")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		if d, err = w.Manifest(c.Context(), d); err != nil {
			return err
		}
		if *quiet {
			_, err := fmt.Fprintln(c.OutOrStdout(), d.Digest)
			return err
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(d)
	}
	return c
}

func newTarget() *cobra.Command {
	c := &cobra.Command{
		Use:   "target [flags] NAME|DIGEST",
		Short: "Print digest, size and media type of what a name points at",
		Args:  cobra.ExactArgs(1),
	}
	f := newFlags(c)
	f.platform = c.Flags().String("platform", "", "of an index the manifest for `PLATFORM`, as linux/amd64")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err == nil && c.Flags().Changed("platform") {
			d, err = w.Manifest(c.Context(), d)
		}
		if err != nil {
			return err
		}
		if err := records.Write(d, d.Digest, cli.Size(d.Size), d.MediaType); err != nil {
			return err
		}
		return records.Close()
	}
	return c
}

func newConfig() *cobra.Command {
	c := &cobra.Command{
		Use:   "config [flags] NAME|DIGEST",
		Short: "Print the image config of the platform's manifest, byte for byte",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		b, err := w.Config(c.Context(), d)
		if err != nil {
			return err
		}
		_, err = c.OutOrStdout().Write(b)
		return err
	}
	return c
}

func newLayers() *cobra.Command {
	c := &cobra.Command{
		Use:   "layers [flags] NAME|DIGEST",
		Short: "List the layers of the platform's manifest, the lowest first",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE", "DIFF ID", "CHAIN ID")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		layers, err := w.Layers(c.Context(), d)
		if err != nil {
			return err
		}
		for _, l := range layers {
			if err := records.Write(l, l.Digest, cli.Size(l.Size), l.MediaType, l.DiffID, l.ChainID); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

func newChain() *cobra.Command {
	c := &cobra.Command{
		Use:   "chain [flags] NAME|DIGEST",
		Short: "Print the chain ID of all layers, and the digest of the platform's manifest",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	records := cli.NewRecords(c, "CHAIN ID", "DIGEST")
	config := c.Flags().Bool("config", false, "print the image config too, byte for byte, after that line")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		img, err := w.Contents(c.Context(), d)
		if err != nil {
			return err
		}
		if len(img.Layers) == 0 {
			return errdefs.ErrNotImplemented.WithMessage(args[0] + " has no layers")
		}
		v := struct {
			ChainID digest.Digest `json:"chainID"`
			Digest  digest.Digest `json:"digest"`
		}{img.Layers[len(img.Layers)-1].ChainID, img.Manifest.Digest}
		if err := records.Write(v, v.ChainID, v.Digest); err != nil {
			return err
		}
		if err := records.Close(); err != nil || !*config {
			return err
		}
		_, err = c.OutOrStdout().Write(img.Config)
		return err
	}
	return c
}

func newChildren() *cobra.Command {
	c := &cobra.Command{
		Use:   "children [flags] NAME|DIGEST",
		Short: "List what an index or manifest refers to: the platform's manifest, or config and layers",
	}
	mediaType := c.Flags().String("type", "", "fail where it should be an index or manifest, by this media `TYPE`, and is none")
	_, list := listDescriptors(c, func(w image.Walker, ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
		if !image.IsIndex(*mediaType) && !image.IsManifest(*mediaType) {
			return w.Children(ctx, d)
		}
		d.MediaType = *mediaType
		children, err := w.Children(ctx, d)
		if errdefs.IsInvalidArgument(err) {
			err = errclass.As(err, errdefs.ErrDataLoss)
		}
		return children, err
	})
	c.RunE = func(c *cobra.Command, args []string) error {
		_, err := list(args[0])
		return err
	}
	return c
}

func newCheck() *cobra.Command {
	c := &cobra.Command{
		Use:   "check [flags] NAME|DIGEST",
		Short: "List which blobs of an image are missing; status 3 if any is",
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
			return missing, nil // manifest or config is among what is missing
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

func newSources() *cobra.Command {
	c := &cobra.Command{
		Use:   "sources [flags] NAME|DIGEST HOST/REPOSITORY",
		Short: "List which blobs of an image another repository of the registry is known to have",
		Args:  cobra.ExactArgs(2),
	}
	f := newFlags(c)
	f.allPlatforms, f.platform = new(bool), new(string)
	*f.allPlatforms = true
	records := cli.NewRecords(c, "DIGEST", "REPOSITORY")
	c.RunE = func(c *cobra.Command, args []string) error {
		host, repository, ok := strings.Cut(args[1], "/")
		if !ok || host == "" {
			return cli.Usagef("%q is no HOST/REPOSITORY", args[1])
		}
		_, names, err := f.open()
		if err != nil {
			return err
		}
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		sources, err := names.Sources(c.Context(), w, d, host, repository)
		if err != nil {
			return err
		}
		for _, s := range sources {
			if err := records.Write(s, s.Digest, s.Repository); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

// listDescriptors makes c a verb that prints descriptors found from an image, and returns what
// prints them and tells how many there were.
func listDescriptors(c *cobra.Command, find func(image.Walker, context.Context, v1.Descriptor) ([]v1.Descriptor, error)) (*flags, func(ref string) (int, error)) {
	c.Args = cobra.ExactArgs(1)
	f := newPlatformFlags(c)
	f.allPlatforms = c.Flags().Bool("all-platforms", false, "every manifest of an index")
	c.MarkFlagsMutuallyExclusive("all-platforms", "platform")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE")
	return f, func(ref string) (int, error) {
		w, d, err := f.walker(c.Context(), ref)
		if err != nil {
			return 0, err
		}
		found, err := find(w, c.Context(), d)
		if err != nil {
			return 0, err
		}
		for _, d := range found {
			if err := records.Write(d, d.Digest, cli.Size(d.Size), d.MediaType); err != nil {
				return 0, err
			}
		}
		return len(found), records.Close()
	}
}
