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
		Short: "Delete the blobs and snapshots that no name and no container needs, and ingests left behind",
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
		sweep.Snapshots = sweepSnapshots(store.Root(), before, *dryRun, records)
		sweep.Leftovers = func(l content.Leftover) error {
			record := struct {
				Ingest   string    `json:"ingest,omitempty"`
				Path     string    `json:"path"`
				Size     int64     `json:"size"`
				StoredAt time.Time `json:"storedAt"`
			}{l.Ref, l.Path, l.Size, l.ChangedAt}
			if l.Ref == "" {
				return records.Write(record, l.Path, cli.Size(l.Size), l.ChangedAt, "torn")
			}
			return records.Write(record, l.Ref, cli.Size(l.Size), l.ChangedAt, "ingest")
		}
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
		return records.Close()
	}
	cli.Main(c)
}
