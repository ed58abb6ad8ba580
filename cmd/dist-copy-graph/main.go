// Dist-copy-graph copies everything that a manifest refers to from one place to another.
package main

import (
	"context"
	"fmt"
	"runtime/debug"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/gate"
	"distkit/cmd/internal/registry"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/dustin/go-humanize"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// softLimit is the size up to which the heap is rarely collected, and for a small image never: a graph of 32,768
// objects fits. Above it, the heap is collected more often.
const (
	softLimit     = 24 << 20
	seldomPercent = 400
)

func main() {
	debug.SetMemoryLimit(softLimit)
	debug.SetGCPercent(seldomPercent)
	cli.Main(newCommand())
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-copy-graph [flags] DIGEST|TAG|REF [SIZE [TYPE]]",
		Short: "copy a manifest and everything it refers to",
		Args:  cobra.RangeArgs(1, 3),
	}
	f := c.Flags()
	var at places
	at.root = cli.Root(f)
	at.namespace = cli.Namespace(f)
	f.StringVar(&at.from, "from", "", "copy from the batch `COMMAND`, run by sh")
	f.StringVar(&at.fromRoot, "from-root", "", "copy from the store or layout in `DIR`")
	f.StringVar(&at.fromRemote, "from-remote", "", "copy from the remote `LOCATOR`")
	f.BoolVar(&at.ref, "ref", false, "copy REF, LOCATOR[:TAG][@DIGEST], from its remote; in the store it gets its name")
	f.StringVar(&at.to, "to", "", "copy to the batch `COMMAND`, run by sh")
	f.StringVar(&at.toRemote, "to-remote", "", "copy to the remote `LOCATOR`")
	f.StringVar(&at.toRef, "to-ref", "", "with --ref: copy to `REF`, LOCATOR[:TAG], which gets the tag of the source unless it has one")
	f.StringVar(&at.mount, "mount", "", "have the target take blobs from its `REPOSITORY` where it can")
	f.StringVar(&at.sources, "sources", "", "have the target, `HOST/REPOSITORY`, take blobs from where labels say that it has them")
	f.StringArrayVar(&at.tags, "tag", nil, "the target keeps the manifest as `TAG`, in a store as a name; may be repeated")
	f.StringArrayVar(&at.labels, "label", nil, "set the label `KEY=VALUE` of a name in the store; without a value take it away")
	at.referrers = cli.ReferrersFlag(f, "copy")
	at.verify = gate.Flag(f)
	platforms := f.StringArray("platform", nil, "of an index, only the manifest for `PLATFORM`; may be repeated")
	jobs := f.IntP("jobs", "j", 8, "objects that move at the same time: `N`")
	maxBytes := f.Int64("max-bytes", 0, "fail if more than so many `BYTES` would move")
	dryRun := f.Bool("dry-run", false, "list what would move, and move nothing")
	out := newOutput(c)
	at.options = registry.Flags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if *dryRun && *at.verify != "" {
			return cli.Usagef("--dry-run gives no name: there is nothing to --verify")
		}
		if *jobs < 1 || *jobs > 99 {
			return cli.Usagef("--jobs wants a number from 1 to 99, got %d", *jobs)
		}
		roots, err := at.readRoots(c, args)
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
		g.Record = out.record
		end, err := at.open(c.Context(), g, roots)
		if err != nil {
			return err
		}
		end = shown(g, out.Quiet(), end)
		if *at.verify != "" && !at.intoStore() {
			g.Gate = func(ctx context.Context) error { return at.admitAll(ctx, g, roots) }
		}
		if err = run(c.Context(), g, roots, at.intoStore()); err == nil && at.intoStore() && !g.DryRun {
			err = at.name(c.Context(), g, roots, out.last)
		}
		if failed := end(); err == nil {
			err = failed
		}
		if err != nil {
			return err
		}
		return out.end(at.tags)
	}
	return c
}

// run copies. If a signal ends it, its error says what is kept: in a store also the parts of objects.
func run(ctx context.Context, g *copygraph.Copy, roots []root, intoStore bool) error {
	var list []v1.Descriptor
	for _, r := range roots {
		list = append(list, r.Descriptor)
	}
	err := g.Run(ctx, list...)
	if err == nil || ctx.Err() == nil {
		return err
	}
	t := g.Totals()
	kept := t.LandedBytes
	if v, ok := g.Progress.(*view); ok && intoStore {
		kept = v.come()
	}
	return fmt.Errorf("interrupted: %s of %s kept, %d of %d objects whole; the same command resumes",
		humanize.IBytes(uint64(kept)), humanize.IBytes(uint64(t.Bytes)), t.Landed, t.Objects)
}
