// Dist-label shows and changes the labels of a blob.
package main

import (
	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-label [flags] DIGEST [KEY=VALUE…]",
		Short: "show and change the labels of a blob",
		Args:  cobra.MinimumNArgs(1),
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		change := content.Info{Digest: digest.Digest(args[0])}
		var err error
		if change.Labels, err = cli.Labels(args[1:]); err != nil {
			return err
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		var info content.Info
		if len(change.Labels) > 0 {
			info, err = s.Update(c.Context(), change, cli.LabelPaths(change.Labels)...)
		} else {
			info, err = s.Info(c.Context(), change.Digest)
		}
		if err != nil {
			return err
		}
		return out.WriteLabels(info.Labels)
	}
	return c
}
