// Dist-untag deletes tags and manifests at a remote.
package main

import (
	"cmp"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Object string `json:"object"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-untag [flags] LOCATOR OBJECT…|REF…",
		Short: "delete tags and manifests at a remote",
		Args:  cobra.MinimumNArgs(1),
	}
	options := registry.Flags(c)
	records := cli.NewRecords(c, "OBJECT")
	c.RunE = func(c *cobra.Command, args []string) error {
		objects, open, err := registry.NewRemotes(options).Objects(args)
		if err != nil {
			return err
		}
		err = cli.Each(c, objects, func(name string) error {
			r, object, err := open(name)
			if err != nil {
				return err
			}
			if err := r.Delete(c.Context(), object); err != nil {
				return err
			}
			return records.Write(record{name}, name)
		})
		return cmp.Or(err, records.Close())
	}
	return c
}
