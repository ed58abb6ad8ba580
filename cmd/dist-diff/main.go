// Dist-diff writes what makes one directory of another as a layer.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"distkit/archive"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
)

func main() { cli.Main(newCmd()) }

func newCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-diff [flags] [LOWER] UPPER",
		Short: "write the difference between two directories as a layer",
		Args:  cobra.RangeArgs(1, 2),
	}
	form := c.Flags().String("compress", "gzip", "compress with `FORM`: gzip, zstd or none")
	descriptor := c.Flags().String("descriptor", "", "write the layer's descriptor to `FILE` at the end")
	overlay := c.Flags().Bool("overlay", false, "UPPER is an upper directory of overlayfs, and says itself what it changes")
	uids := c.Flags().StringArray("uid-map", nil, "files of the users from FILE on are those from LAYER on in the layer: `LAYER:FILE:SIZE`")
	gids := c.Flags().StringArray("gid-map", nil, "the same for groups: `LAYER:FILE:SIZE`")
	only := c.Flags().StringArray("only", nil, "write only what differs at `PATH` and below it")
	exclude := c.Flags().StringArray("exclude", nil, "leave out `PATH` and what is below it")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := cli.Refused(); err != nil {
			return err
		}
		compression, err := archive.ParseCompression(*form)
		if err != nil {
			return cli.Usagef("--compress: %w", err)
		}
		latest, err := sourceDate()
		if err != nil {
			return err
		}
		opts := archive.DiffOptions{Compression: compression, Overlay: *overlay, Latest: latest, Only: *only, Exclude: *exclude}
		if opts.UIDs, err = archive.ParseIDMap(*uids); err != nil {
			return cli.Usagef("--uid-map: %w", err)
		}
		if opts.GIDs, err = archive.ParseIDMap(*gids); err != nil {
			return cli.Usagef("--gid-map: %w", err)
		}
		lower, upper := "", args[len(args)-1]
		if len(args) == 2 {
			if lower = args[0]; lower == "" {
				return cli.Usagef("LOWER is empty: leave it out to compare with nothing")
			}
		}
		if *overlay && lower != "" {
			return cli.Usagef("--overlay: LOWER is not read: leave it out")
		}
		return diff(c, lower, upper, *descriptor, opts)
	}
	return c
}

// sourceDate returns the time that limits the times in a layer, or the zero time for no limit.
func sourceDate() (time.Time, error) {
	s := os.Getenv("SOURCE_DATE_EPOCH")
	if s == "" {
		return time.Time{}, nil
	}
	seconds, err := strconv.ParseInt(s, 10, 64)
	if err != nil || seconds < 0 {
		return time.Time{}, cli.Usagef("SOURCE_DATE_EPOCH: %q is not a number of seconds", s)
	}
	return time.Unix(seconds, 0), nil
}

// diff writes the layer, and then the descriptor. It opens the descriptor's file first.
func diff(c *cobra.Command, lower, upper, descriptor string, opts archive.DiffOptions) error {
	var to *os.File
	if descriptor != "" {
		var err error
		if to, err = os.Create(descriptor); err != nil {
			return err
		}
		defer to.Close()
	}
	step := progress.Begin("")
	defer step.End()
	layer, err := archive.Diff(c.Context(), step.Writer(c.OutOrStdout()), lower, upper, opts)
	if err != nil || to == nil {
		return err
	}
	if err := cli.Flush(c); err != nil {
		return fmt.Errorf("write standard output: %w", err)
	}
	if err := json.NewEncoder(to).Encode(layer); err != nil {
		return fmt.Errorf("write descriptor: %w", err)
	}
	if err := to.Close(); err != nil {
		return fmt.Errorf("write descriptor: %w", err)
	}
	return nil
}
