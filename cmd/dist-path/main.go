// Dist-path prints where blobs are.
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
	Digest digest.Digest `json:"digest"`
	Path   string        `json:"path"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-path [flags] DIGEST…",
		Short: "print the paths of blobs",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "DIGEST", "PATH")
	quiet := c.Flags().Lookup("quiet")
	quiet.Usage = "print the path alone"
	plain := c.Flags().BoolP("no-digest", "n", false, "the same as --quiet")
	c.RunE = func(c *cobra.Command, args []string) error {
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		if *plain {
			_ = quiet.Value.Set("true")
		}
		err = cli.Each(c, args, func(object string) error {
			dgst, err := s.Complete(c.Context(), object)
			if err != nil {
				return err
			}
			path, err := s.Path(dgst)
			if err != nil {
				return err
			}
			if out.Quiet() {
				return out.WriteKey(path)
			}
			return out.Write(record{dgst, path}, dgst, path)
		})
		return cmp.Or(err, out.Close())
	}
	return c
}
