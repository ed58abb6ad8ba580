// Dist-resolve prints the descriptor of a tag or digest at a remote.
package main

import (
	"encoding/json"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-resolve [flags] LOCATOR OBJECT",
		Short: "print the descriptor of a tag or digest at a remote",
		Args:  cobra.ExactArgs(2),
	}
	options := registry.Flags(c)
	platform := c.Flags().String("platform", "", "walk an index to the one manifest for `PLATFORM`, as linux/amd64")
	fields := c.Flags().Bool("fields", false, "print digest, size and media type with tabs between them, instead of JSON")
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := remotes.Open(args[0], *options)
		if err != nil {
			return err
		}
		var desc ocispec.Descriptor
		if c.Flags().Changed("platform") {
			desc, err = remotes.ResolvePlatform(c.Context(), r, args[1], *platform)
		} else {
			desc, err = r.Resolve(c.Context(), args[1])
		}
		if err != nil {
			return err
		}
		if *fields {
			return cli.WriteRecord(c, desc.Digest, desc.Size, desc.MediaType)
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(desc)
	}
	return c
}
