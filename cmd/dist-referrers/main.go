// Dist-referrers lists the manifests that refer to another as their subject.
package main

import (
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-referrers [flags] LOCATOR DIGEST",
		Short: "list the manifests that refer to another as their subject",
		Args:  cobra.ExactArgs(2),
	}
	options := registry.Flags(c)
	artifactType := c.Flags().String("type", "", "list artifacts of `TYPE` only")
	records := cli.NewRecords(c, "DIGEST", "TYPE", "SIZE")
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := remotes.Open(args[0], *options)
		if err != nil {
			return err
		}
		subject, err := digest.Parse(args[1])
		if err != nil {
			return cli.Usagef("digest %q: %v: resolve a tag first", args[1], err)
		}
		for desc, err := range r.Referrers(c.Context(), subject, *artifactType) {
			if err != nil {
				return err
			}
			if err := records.Write(desc, desc.Digest, desc.ArtifactType, cli.Size(desc.Size)); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}
