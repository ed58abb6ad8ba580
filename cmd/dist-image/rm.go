package main

import (
	"fmt"

	"distkit/cmd/internal/cli"

	"github.com/spf13/cobra"
)

func newRm() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm [flags] NAME…|-",
		Short: "Take names away; the blobs stay",
		Args:  cobra.ArbitraryArgs,
	}
	f := newFlags(c)
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
		return cli.Each(c, args, func(name string) error {
			if err := names.Delete(c.Context(), name); err != nil {
				return err
			}
			_, err := fmt.Fprint(c.OutOrStdout(), name, end)
			return err
		})
	}
	return c
}
