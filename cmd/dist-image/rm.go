package main

import (
	"fmt"

	"distkit/cmd/internal/cli"

	"github.com/spf13/cobra"
)

func newRm() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm [flags] NAME…|-",
		Short: "take names away; the blobs stay",
		Args:  cobra.ArbitraryArgs,
	}
	f := newFlags(c)
	digests := c.Flags().Bool("digest", false, "objects are digests: take away what points at them and has no name")
	zero := c.Flags().BoolP("zero", "z", false, "names on standard input and output end with NUL instead of newline")
	c.RunE = func(c *cobra.Command, args []string) error {
		_, names, err := f.open()
		if err != nil {
			return err
		}
		end := "\n"
		if *zero {
			end = "\x00"
		}
		remove := names.DeleteAll
		if *digests {
			remove = names.DeleteUnnamed
		}
		return cli.Batch(c, args, func(objects []string) ([]error, error) {
			return remove(c.Context(), objects)
		}, func(object string) error {
			_, err := fmt.Fprint(c.OutOrStdout(), object, end)
			return err
		})
	}
	return c
}
