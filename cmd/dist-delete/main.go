// Dist-delete deletes blobs and prints the digest of each.
package main

import (
	"cmp"

	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Digest string `json:"digest"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-delete [flags] DIGEST…",
		Short: "delete blobs",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "DIGEST")
	c.RunE = func(c *cobra.Command, args []string) error {
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		err = cli.Each(c, args, func(object string) error {
			if content.IsAbbreviation(object) {
				dgst, err := s.Complete(c.Context(), object)
				if err != nil {
					return err
				}
				return cli.Usagef("%s is not a whole digest, so nothing is deleted; it stands for %s", object, dgst)
			}
			if err := s.Delete(c.Context(), digest.Digest(object)); err != nil {
				return err
			}
			return out.Write(record{object}, object)
		})
		return cmp.Or(err, out.Close())
	}
	return c
}
