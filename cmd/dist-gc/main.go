// Command dist-gc deletes the blobs and the snapshots that no name and no container needs.
package main

import (
	"errors"
	"os"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/disk"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() {
	c := &cobra.Command{
		Use:   "dist-gc [flags]",
		Short: "delete what no name reaches",
		Args:  cobra.NoArgs,
	}
	root := cli.Root(c.Flags())
	grace := c.Flags().Duration("grace", 24*time.Hour, "spare what was stored less than `DURATION` ago")
	dryRun := c.Flags().BoolP("dry-run", "n", false, "print what would be deleted, and delete nothing")
	wait := c.Flags().Duration("wait", 10*time.Minute, "wait for `DURATION` at most, in all, for those who hold the store")
	noWait := c.Flags().Bool("no-wait", false, "don't wait for those who hold the store: --wait 0")
	out := &report{records: cli.NewRecords(c, "KEY", "SIZE", "STORED", "KIND"), failed: cli.Tally{C: c}, dryRun: dryRun}
	total := c.Flags().Bool("total", false, "print a record of the sums at the end")
	explain := c.Flags().String("explain", "", "print what keeps the blob, or the snapshot, of `DIGEST`, and delete nothing")
	verbose := c.Flags().BoolP("verbose", "v", false, "say on standard error whom it waits for, and the sums")
	c.RunE = func(c *cobra.Command, _ []string) error {
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		if *noWait {
			*wait = 0
		}
		ctx := c.Context()
		if *verbose {
			ctx = disk.WithNotice(ctx, func(text string) { cli.Report(c, errors.New(text)) })
		}
		_, terminal := cli.IsTerminal(os.Stderr)
		before := time.Now().Add(-*grace)
		sweep := image.Sweep{Store: store, Before: before, DryRun: *dryRun, Wait: *wait, Damaged: out.goOn, Leftovers: out.leftover}
		if *explain != "" {
			out.records.Columns("REASON", "NAMESPACE", "NAME", "TARGET")
			dgst := digest.Digest(*explain)
			if content.IsAbbreviation(*explain) {
				if dgst, err = store.Complete(c.Context(), *explain); err != nil {
					return err
				}
			}
			if err := sweep.Explain(c.Context(), dgst, out.reason); err != nil {
				return err
			}
			return out.close(false, false)
		}
		sweep.Snapshots = sweepSnapshots(store.Root(), before, *dryRun, out.snapshot, out.goOn)
		out.step = progress.Begin(map[bool]string{false: "deleted", true: "to delete"}[*dryRun])
		out.Kept, err = sweep.Run(ctx, out.blob)
		if out.step.End(); err != nil {
			return err
		}
		return out.close(*total, terminal || *verbose)
	}
	cli.Main(c)
}
