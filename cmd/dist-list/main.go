// Dist-list lists the blobs of a store.
package main

import (
	"cmp"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Digest  digest.Digest     `json:"digest"`
	Size    int64             `json:"size"`
	Stored  time.Time         `json:"storedAt"`
	Updated time.Time         `json:"updatedAt"` // time of the last change of its labels, if that is later
	Labels  map[string]string `json:"labels,omitempty"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-list [flags] [FILTER…]",
		Short: "list blobs",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "DIGEST", "SIZE", "AGE")
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := filter.Parse(args)
		if err != nil {
			return err
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		if out.Quiet() && wanted.All() {
			return s.Digests(c.Context(), func(d digest.Digest) error { return out.Write(nil, d) })
		}
		err = s.Walk(c.Context(), func(i content.Info) error {
			if ok, err := wanted.Match(i); err != nil || !ok {
				return err
			}
			return out.Write(record{i.Digest, i.Size, i.CreatedAt, i.UpdatedAt, i.Labels}, i.Digest, cli.Size(i.Size), i.CreatedAt)
		})
		return cmp.Or(err, out.Close())
	}
	return c
}
