// Command snap makes, shows and mounts layered root filesystems.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"distkit/cmd/internal/cli"
	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCmd()) }

// store are the flags that all verbs need to open a store.
type store struct{ root, namespace, driver *string }

func newCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "snap VERB",
		Short: "manage layered root filesystems",
	}
	f := c.PersistentFlags()
	s := &store{root: cli.Root(f), namespace: cli.Namespace(f)}
	s.driver = f.String("snapshotter", "", "the `DRIVER`, see snap drivers (env CONTAINERD_SNAPSHOTTER)")
	if v := os.Getenv("CONTAINERD_SNAPSHOTTER"); v != "" {
		*s.driver = v
	}
	c.AddCommand(
		newPrepare(s), newView(s), newCommit(s), newStack(s), newRm(s), newLabel(s),
		newLs(s), newStat(s), newUsage(s), newTree(s), newDrivers(s),
		newMounts(s), newMount(s), newUmount(s), newDiff(s), newChanges(s),
	)
	return c
}

func (s *store) open(ctx context.Context) (*snapshot.Snapshotter, error) {
	return s.openWith(ctx, false)
}

func (s *store) openWith(ctx context.Context, noSync bool) (*snapshot.Snapshotter, error) {
	return drivers.Open(ctx, *s.root, *s.driver, snapshot.Options{
		Namespace: *s.namespace, NoSync: noSync,
		Diff: func(ctx context.Context, upper *os.File, w io.Writer) error {
			return distDiff(ctx, &snapshot.Comparison{Upper: upper, Overlay: true}, []string{"--compress", "none"}, w)
		},
		Left: func(name string, left map[string]int64) {
			fmt.Fprintf(os.Stderr, "snap: %s: left out %s\n", name, cli.Counts(left))
		},
	})
}
