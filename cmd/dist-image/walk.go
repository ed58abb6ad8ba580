package main

import (
	"encoding/json"
	"fmt"

	"distkit/cmd/internal/cli"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func newManifest() *cobra.Command {
	c := &cobra.Command{
		Use:   "manifest [flags] NAME|DIGEST",
		Short: "Print the descriptor of the platform's manifest",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		if d, err = w.Manifest(c.Context(), d); err != nil {
			return err
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(d)
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

func newChildren() *cobra.Command {
	c := &cobra.Command{
		Use:   "children [flags] NAME|DIGEST",
		Short: "List what an index or manifest refers to: the platform's manifest, or config and layers",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	f.allPlatforms = c.Flags().Bool("all-platforms", false, "every manifest of an index")
	c.MarkFlagsMutuallyExclusive("all-platforms", "platform")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		children, err := w.Children(c.Context(), d)
		if err != nil {
			return err
		}
		for _, d := range children {
			if err := records.Write(d, d.Digest, cli.Size(d.Size), d.MediaType); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}

func newCheck() *cobra.Command {
	c := &cobra.Command{
		Use:   "check [flags] NAME|DIGEST",
		Short: "List which blobs of an image are missing; status 3 if any is",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	f.allPlatforms = c.Flags().Bool("all-platforms", false, "every manifest of an index")
	c.MarkFlagsMutuallyExclusive("all-platforms", "platform")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		missing, err := w.Missing(c.Context(), d)
		if err != nil {
			return err
		}
		for _, d := range missing {
			if err := records.Write(d, d.Digest, cli.Size(d.Size), d.MediaType); err != nil {
				return err
			}
		}
		if err := records.Close(); err != nil {
			return err
		}
		if len(missing) > 0 {
			return fmt.Errorf("%s is incomplete: %d of its blobs are missing: %w", args[0], len(missing), errdefs.ErrNotFound)
		}
		return nil
	}
	return c
}
