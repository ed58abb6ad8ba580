// Dist-fetch writes a manifest or blob of a remote to standard output.
package main

import (
	"io"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-fetch [flags] REF|LOCATOR [OBJECT [HINT…]]",
		Short: "write a manifest or blob of a remote to standard output",
	}
	many := registry.BatchFlag(c, "write what the requests on standard input ask for: dist-batch(7)")
	options := registry.Flags(c)
	c.Flags().IntVar(&options.Parts, "parts", 1, "fetch a large blob in `N` ranges at the same time")
	c.Flags().BoolVar(&options.FollowURLs, "follow-urls", false, "fetch a blob that the registry does not have from the addresses of url: hints")
	c.Flags().BoolVar(&options.Unverified, "no-verify", false, "leave it to the reader to hash a blob; its length is checked")
	c.RunE = func(c *cobra.Command, args []string) error {
		if options.Parts < 1 || options.Parts > 64 {
			return cli.Usagef("--parts %d: from 1 to 64", options.Parts)
		}
		if *many && options.Parts > 1 {
			return cli.Usagef("--parts and --batch exclude each other: a batch reads several objects at the same time")
		}
		if *many {
			return registry.Batch(c, args[0], *options, remotes.FetchBatch)
		}
		locator, object, hints, err := registry.Object(args)
		if err != nil {
			return err
		}
		r, err := remotes.Open(locator, *options)
		if err != nil {
			return err
		}
		body, err := r.Fetch(c.Context(), object, hints...)
		if err != nil {
			return err
		}
		defer body.Close()
		_, err = io.Copy(cli.Stdout, body)
		return err
	}
	return c
}
