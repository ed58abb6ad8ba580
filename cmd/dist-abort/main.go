// Dist-abort throws away what ingests left behind.
package main

import (
	"cmp"

	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Ref string `json:"ref"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-abort [flags] REF…",
		Short: "throw away unfinished ingests",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "REF")
	c.RunE = func(c *cobra.Command, args []string) error {
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		err = cli.Each(c, args, func(ref string) error {
			if err := s.Abort(c.Context(), ref); err != nil {
				return err
			}
			return out.Write(record{ref}, ref)
		})
		return cmp.Or(err, out.Close())
	}
	return c
}
