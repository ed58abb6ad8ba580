package main

import (
	"distkit/cmd/internal/cli"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func newChain() *cobra.Command {
	c := &cobra.Command{
		Use:   "chain [flags] NAME|DIGEST",
		Short: "print the chain ID of all layers, and the digest of the platform's manifest",
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
