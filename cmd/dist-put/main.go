// Dist-put stores standard input as a manifest or blob at a remote.
package main

import (
	"io"
	"os"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-put [flags] REF|LOCATOR [OBJECT [HINT…]]",
		Short: "store standard input as a blob or manifest at a remote",
	}
	many := registry.BatchFlag(c, "store what the requests on standard input bring: dist-batch(7)")
	options := registry.Flags(c)
	c.Flags().BoolVar(&options.IfAbsent, "if-absent", false, "put no tag that exists with another digest")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "STATE")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *many {
			return registry.Batch(c, args[0], *options, remotes.PutBatch)
		}
		locator, object, hints, err := registry.Object(args)
		if err != nil {
			return err
		}
		r, err := remotes.Open(locator, *options)
		if err != nil {
			return err
		}
		// a file can be read again if an upload is cut
		var content io.Reader = os.Stdin
		if info, err := os.Stdin.Stat(); err != nil || !info.Mode().IsRegular() {
			in, err := cli.Stdin(c.Context())
			if err != nil {
				return err
			}
			defer in.Close()
			content = in
		}
		pushed, err := r.Push(c.Context(), object, content, hints...)
		if err != nil {
			return err
		}
		if err := records.Write(pushed, pushed.Digest, cli.Size(pushed.Size), pushed.State); err != nil {
			return err
		}
		return records.Close()
	}
	return c
}
