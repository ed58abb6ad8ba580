// Dist-label shows and changes the labels of blobs.
package main

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Digest digest.Digest `json:"digest"`
	Key    string        `json:"key"`
	Value  string        `json:"value"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-label [flags] DIGEST…|- [KEY=VALUE…]",
		Short: "show and set the labels of blobs",
		Args:  cobra.MinimumNArgs(1),
	}
	root := cli.Root(c.Flags())
	replace := c.Flags().Bool("replace", false, "the labels given replace all that the blob has, also if their file is damaged")
	out := cli.NewRecords(c, "DIGEST", "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		// Digests never contain "=", and label arguments always do.
		n := slices.IndexFunc(args, func(a string) bool { return strings.Contains(a, "=") })
		if n < 0 {
			n = len(args)
		}
		if n == 0 {
			return cli.Usagef("a DIGEST is missing before %q; usage: %s", args[0], c.UseLine())
		}
		labels, err := cli.Labels(args[n:])
		if err != nil {
			return err
		}
		paths := cli.LabelPaths(labels)
		if *replace {
			paths = []string{"labels"}
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		one := n == 1 && args[0] != "-"
		if one {
			out.Columns("KEY", "VALUE")
		}
		label := func(dgst digest.Digest) (info content.Info, err error) {
			if len(paths) > 0 {
				return s.Update(c.Context(), content.Info{Digest: dgst, Labels: labels}, paths...)
			}
			return s.Info(c.Context(), dgst)
		}
		err = cli.Each(c, args[:n], func(object string) error {
			dgst, err := s.Complete(c.Context(), object)
			if err != nil {
				return err
			}
			info, err := label(dgst)
			if err != nil {
				return err
			}
			if out.Quiet() {
				return out.Write(nil, info.Digest)
			}
			for _, k := range slices.Sorted(maps.Keys(info.Labels)) {
				r := record{info.Digest, k, info.Labels[k]}
				cells := []any{r.Digest, r.Key, r.Value}
				if one {
					cells = cells[1:]
				}
				if err := out.Write(r, cells...); err != nil {
					return err
				}
			}
			return nil
		})
		return cmp.Or(err, out.Close())
	}
	return c
}
