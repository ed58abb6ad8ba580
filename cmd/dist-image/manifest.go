package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"
)

func newManifest() *cobra.Command {
	c := &cobra.Command{
		Use:   "manifest [flags] NAME|DIGEST",
		Short: "print the descriptor of the platform's manifest",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	quiet := c.Flags().BoolP("quiet", "q", false, "print its digest alone")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		if d, err = w.Manifest(c.Context(), d); err != nil {
			return err
		}
		if *quiet {
			_, err := fmt.Fprintln(c.OutOrStdout(), d.Digest)
			return err
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(d)
	}
	return c
}
