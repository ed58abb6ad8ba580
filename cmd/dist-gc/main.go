// Command dist-gc deletes the blobs and the snapshots that no name and no container needs.
package main

import (
	"errors"
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
	wait := c.Flags().Duration("wait", 10*time.Minute, "wait for `DURATION` at most until nobody holds the store")
	records := cli.NewRecords(c, "KEY", "SIZE", "STORED", "KIND")
	c.RunE = func(c *cobra.Command, _ []string) error {
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		before := time.Now().Add(-*grace)
		sweep := image.Sweep{Store: store, Before: before, DryRun: *dryRun, Wait: *wait}
		// What is printed may have to wait for its reader, and nobody else is to wait for that.
		var printed []func() error
		later := func(f func() error) error { printed = append(printed, f); return nil }
		write := func(v any, columns ...any) error { return later(func() error { return records.Write(v, columns...) }) }
		sweep.Snapshots = sweepSnapshots(store.Root(), before, *dryRun, write)
		sweep.Leftovers = func(l content.Leftover) error {
			record := struct {
				Ingest   string    `json:"ingest,omitempty"`
				Path     string    `json:"path"`
				Size     int64     `json:"size"`
				StoredAt time.Time `json:"storedAt"`
			}{l.Ref, l.Path, l.Size, l.ChangedAt}
			if l.Ref == "" {
				return write(record, l.Path, cli.Size(l.Size), l.ChangedAt, "torn")
			}
			return write(record, l.Ref, cli.Size(l.Size), l.ChangedAt, "ingest")
		}
		err = sweep.Run(c.Context(), func(b content.Info) error {
			record := struct {
				Digest   string    `json:"digest"`
				Size     int64     `json:"size"`
				StoredAt time.Time `json:"storedAt"`
			}{string(b.Digest), b.Size, b.CreatedAt}
			return write(record, b.Digest, cli.Size(b.Size), b.CreatedAt, "blob")
		})
		for _, f := range printed {
			if perr := f(); perr != nil {
				return errors.Join(err, perr)
			}
		}
		if err != nil {
			return err
		}
		return records.Close()
	}
	cli.Main(c)
}
