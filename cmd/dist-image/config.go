package main

import (
	"github.com/spf13/cobra"
)

func newConfig() *cobra.Command {
	c := &cobra.Command{
		Use:   "config [flags] NAME|DIGEST",
		Short: "print the image config of the platform's manifest, byte for byte",
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
