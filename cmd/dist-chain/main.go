// Dist-chain computes chain IDs.
package main

import (
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"distkit/archive"
	"distkit/cmd/internal/cli"
)

func main() { cli.Main(newCmd()) }

func newCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "dist-chain [flags] DIFFID…",
		Short: "print the chain IDs of a stack of layers",
		Args:  cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			// One bad diff ID makes all chain IDs above it wrong, so check all before printing.
			var diffIDs []digest.Digest
			err := cli.Each(c, args, func(object string) error {
				d := digest.Digest(object)
				if _, err := archive.ChainID("", d); err != nil {
					return err
				}
				diffIDs = append(diffIDs, d)
				return nil
			})
			if err != nil {
				return err
			}
			var chain digest.Digest
			for _, d := range diffIDs {
				if chain, err = archive.ChainID(chain, d); err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), chain)
			}
			return nil
		},
	}
}
