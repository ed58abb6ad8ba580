// Dist-cat writes blobs to standard output.
package main

import (
	"fmt"
	"io"

	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-cat [flags] DIGEST…",
		Short: "write blobs to standard output",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		return cli.Each(c, args, func(object string) error {
			f, err := s.File(digest.Digest(object))
			if err != nil {
				return err
			}
			defer f.Close()
			n, err := io.Copy(c.OutOrStdout(), f.File)
			if err == nil && n != f.Size() {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return fmt.Errorf("write %s: %w", object, err)
			}
			return nil
		})
	}
	return c
}
