// Command dist-gc deletes the blobs and the snapshots that no name and no container needs.
package main

import (
	"time"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"

	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-gc [flags]",
		Short: "Delete the blobs and snapshots that no name of any namespace reaches, and no container",
		Args:  cobra.NoArgs,
	}
	root := cli.Root(c.Flags())
	grace := c.Flags().Duration("grace", 24*time.Hour, "spare what was stored less than `DURATION` ago")
	dryRun := c.Flags().BoolP("dry-run", "n", false, "print what would be deleted, and delete nothing")
	records := cli.NewRecords(c, "KEY", "SIZE", "STORED", "KIND")
	c.RunE = func(c *cobra.Command, _ []string) error {
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		before := time.Now().Add(-*grace)
		sweep := image.Sweep{Store: store, Before: before, DryRun: *dryRun}
		sweep.Snapshots = sweepSnapshots(*root, before, *dryRun, records)
		err = sweep.Run(c.Context(), func(b content.Info) error {
			record := struct {
				Digest   string    `json:"digest"`
				Size     int64     `json:"size"`
				StoredAt time.Time `json:"storedAt"`
			}{string(b.Digest), b.Size, b.CreatedAt}
			return records.Write(record, b.Digest, cli.Size(b.Size), b.CreatedAt, "blob")
		})
		if err != nil {
			return err
		}
		err = store.SweepTorn(c.Context(), before, *dryRun, func(t content.Torn) error {
			record := struct {
				Path     string    `json:"path"`
				Size     int64     `json:"size"`
				StoredAt time.Time `json:"storedAt"`
			}{t.Path, t.Size, t.ChangedAt}
			return records.Write(record, t.Path, cli.Size(t.Size), t.ChangedAt, "torn")
		})
		if err != nil {
			return err
		}
		return records.Close()
	}
	cli.Main(c)
}
