// Dist-copy-graph copies everything that a manifest refers to from one place to another.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// softLimit is what the heap may grow to before it is collected more often: a graph of 32,768 objects fits.
const softLimit = 20 << 20

func main() {
	debug.SetMemoryLimit(softLimit)
	cli.Main(newCommand())
}

type record struct {
	Digest    digest.Digest     `json:"digest"`
	Size      int64             `json:"size"`
	MediaType string            `json:"mediaType"`
	State     copygraph.Outcome `json:"state"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-copy-graph [flags] DIGEST [SIZE [TYPE]]",
		Short: "Copy everything that a manifest refers to from one place to another",
		Args:  cobra.RangeArgs(1, 3),
	}
	f := c.Flags()
	root := cli.Root(f)
	fromRoot := f.String("from-root", "", "copy from the store or layout in `DIR`")
	platforms := f.StringArray("platform", nil, "of an index, only the manifest for `PLATFORM`; may be repeated")
	jobs := f.IntP("jobs", "j", 8, "objects that move at the same time: `N`")
	maxBytes := f.Int64("max-bytes", 0, "fail if more than so many `BYTES` would move")
	dryRun := f.Bool("dry-run", false, "list what would move, and move nothing")
	out := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE", "STATE")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *jobs < 1 || *jobs > 99 {
			return cli.Usagef("--jobs wants a number from 1 to 99, got %d", *jobs)
		}
		roots, err := readRoots(c, args)
		if err != nil {
			return err
		}
		g := &copygraph.Copy{Jobs: *jobs, MaxBytes: *maxBytes, DryRun: *dryRun}
		for _, s := range *platforms {
			p, err := image.ParsePlatform(s)
			if err != nil {
				return err
			}
			g.Platforms = append(g.Platforms, p)
		}
		g.Record = func(d v1.Descriptor, state copygraph.Outcome) error {
			if err := out.Write(record{d.Digest, d.Size, d.MediaType, state}, d.Digest, cli.Size(d.Size), d.MediaType, string(state)); err != nil {
				return err
			}
			return cli.Flush(c)
		}
		end, err := places(c.Context(), g, *root, *fromRoot)
		if err != nil {
			return err
		}
		if err := errors.Join(run(c.Context(), g, roots), end()); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}

// places opens the source and the target, and holds the stores among them. end is called when all is done.
func places(ctx context.Context, g *copygraph.Copy, root, fromRoot string) (end func() error, err error) {
	if fromRoot == "" {
		return nil, cli.Usagef("nothing to copy from: --from-root is missing")
	}
	from, err := content.Open(fromRoot)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(from.Root(), "ingest")); err == nil { // a layout of other tools is not swept
		if err := hold(ctx, from); err != nil {
			return nil, err
		}
	}
	store, err := content.Open(root)
	if err != nil {
		return nil, err
	}
	g.Documents, g.From, g.To = store, copygraph.FromStore(from), copygraph.IntoStore(store)
	if g.DryRun {
		g.From = copygraph.Either{copygraph.FromStore(store), g.From}
		return scratch(g)
	}
	return func() error { return nil }, hold(ctx, store)
}

// scratch has the documents kept in a store of their own, which end removes.
func scratch(g *copygraph.Copy) (end func() error, err error) {
	dir, err := os.MkdirTemp("", "dist-copy-graph-")
	if err != nil {
		return nil, err
	}
	end = func() error { return os.RemoveAll(dir) }
	if g.Documents, err = content.Open(dir); err != nil {
		_ = end()
	}
	return end, err
}

// hold holds a store against the sweep, for this process and those that it starts.
func hold(ctx context.Context, store *content.Store) error {
	env, err := store.Hold(ctx)
	if err != nil {
		return err
	}
	_, value, _ := strings.Cut(env, "=")
	return os.Setenv(content.HoldEnv, value)
}

// run copies. It says how far it came if a signal ends it.
func run(ctx context.Context, g *copygraph.Copy, roots []v1.Descriptor) error {
	err := g.Run(ctx, roots...)
	if err == nil || ctx.Err() == nil {
		return err
	}
	t := g.Totals()
	return fmt.Errorf("interrupted: %d of %d objects have landed, %d of %d bytes; the same command goes on from there",
		t.Landed, t.Objects, t.LandedBytes, t.Bytes)
}
