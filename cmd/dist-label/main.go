// Dist-label shows and changes the labels of a blob.
package main

import (
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
	Digest digest.Digest     `json:"digest"`
	Labels map[string]string `json:"labels"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-label [flags] DIGEST [KEY=VALUE…]",
		Short: "show and change the labels of a blob",
		Args:  cobra.MinimumNArgs(1),
	}
	root := cli.Root(c.Flags())
	out := cli.NewRecords(c, "DIGEST", "LABELS")
	c.RunE = func(c *cobra.Command, args []string) error {
		change := content.Info{Digest: digest.Digest(args[0]), Labels: map[string]string{}}
		var fields []string
		for _, a := range args[1:] {
			key, value, ok := strings.Cut(a, "=")
			if !ok || key == "" {
				return cli.Usagef("label %q is not of the form KEY=VALUE", a)
			}
			change.Labels[key] = value
			fields = append(fields, "labels."+key)
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		var info content.Info
		if len(fields) > 0 {
			info, err = s.Update(c.Context(), change, fields...)
		} else {
			info, err = s.Info(c.Context(), change.Digest)
		}
		if err != nil {
			return err
		}
		var pairs []string
		for _, key := range slices.Sorted(maps.Keys(info.Labels)) {
			pairs = append(pairs, key+"="+info.Labels[key])
		}
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		if err := out.Write(record{info.Digest, info.Labels}, info.Digest, strings.Join(pairs, ",")); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}
