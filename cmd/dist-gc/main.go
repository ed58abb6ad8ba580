// Command dist-gc deletes the blobs that no name reaches.
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
		Short: "Delete the blobs that no name of any namespace reaches",
		Args:  cobra.NoArgs,
	}
	root := cli.Root(c.Flags())
	grace := c.Flags().Duration("grace", 24*time.Hour, "spare what was stored less than `DURATION` ago")
	dryRun := c.Flags().BoolP("dry-run", "n", false, "print what would be deleted, and delete nothing")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "STORED")
	c.RunE = func(c *cobra.Command, _ []string) error {
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		sweep := image.Sweep{Store: store, Before: time.Now().Add(-*grace), DryRun: *dryRun}
		err = sweep.Run(c.Context(), func(b content.Info) error {
			record := struct {
				Digest   string    `json:"digest"`
				Size     int64     `json:"size"`
				StoredAt time.Time `json:"storedAt"`
			}{string(b.Digest), b.Size, b.CreatedAt}
			return records.Write(record, b.Digest, cli.Size(b.Size), b.CreatedAt)
		})
		if err != nil {
			return err
		}
		return records.Close()
	}
	cli.Main(c)
}
