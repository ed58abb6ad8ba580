package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/snapshot"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func newPrepare(s *store) *cobra.Command {
	return newMake(s, "prepare", "make an active snapshot, and print its mounts", (*snapshot.Snapshotter).Prepare)
}

func newView(s *store) *cobra.Command {
	return newMake(s, "view", "make a read-only snapshot, and print its mounts", (*snapshot.Snapshotter).View)
}

func newMake(s *store, verb, short string, do func(*snapshot.Snapshotter, context.Context, string, string, map[string]string) ([]snapshot.Mount, error)) *cobra.Command {
	c := &cobra.Command{Use: verb + " [flags] KEY [PARENT]", Short: short, Args: cobra.RangeArgs(1, 2)}
	labels := labelFlag(c)
	target := c.Flags().String("mount", "", "mount it on `DIR` too; where that fails it is not made")
	mount := mountFlags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		sn, err := s.open(c.Context())
		if err != nil {
			return err
		}
		l, err := cli.Labels(*labels)
		if err != nil {
			return err
		}
		mounts, err := do(sn, c.Context(), args[0], strings.Join(args[1:], ""), l)
		if err == nil && *target != "" {
			if err = mount(sn, args[0], *target); err != nil {
				err = errors.Join(err, sn.Remove(context.WithoutCancel(c.Context()), args[0]))
			}
		}
		if err != nil {
			return err
		}
		return printMounts(c, mounts)
	}
	return c
}

func newCommit(s *store) *cobra.Command {
	c := &cobra.Command{Use: "commit [flags] NAME KEY", Short: "turn the active snapshot KEY into the committed one NAME", Args: cobra.ExactArgs(2)}
	labels, noSync := labelFlag(c), noSyncFlag(c)
	parent := c.Flags().String("parent", "", "the `PARENT` of a snapshot that was prepared without one")
	settle := c.Flags().String("settle", "", "what dist-apply --unresolved wrote into `FILE` is settled first")
	c.RunE = func(c *cobra.Command, args []string) error {
		sn, err := s.openWith(c.Context(), *noSync)
		if err != nil {
			return err
		}
		l, err := cli.Labels(*labels)
		if err != nil {
			return err
		}
		o := snapshot.CommitOptions{Parent: *parent, Labels: l}
		if *settle != "" {
			f, err := os.Open(*settle)
			if errors.Is(err, fs.ErrNotExist) {
				return errdefs.ErrNotFound.WithMessage(err.Error())
			}
			if err != nil {
				return err
			}
			defer f.Close()
			o.Settle = f
		}
		return sn.Commit(c.Context(), args[0], args[1], o)
	}
	return c
}

func newRm(s *store) *cobra.Command {
	c := &cobra.Command{Use: "rm [flags] KEY…|-", Short: "delete snapshots", Args: cobra.ArbitraryArgs}
	noSync := noSyncFlag(c)
	umount := c.Flags().Bool("umount", false, "unmount them first, wherever they are mounted")
	recursive := c.Flags().BoolP("recursive", "r", false, "delete their children first, and the children of these")
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		sn, err := s.openWith(c.Context(), *noSync)
		if err != nil {
			return err
		}
		remover := sn.Remover()
		remove := func(key string) error {
			if *umount {
				if err := sn.UnmountAll(c.Context(), key); err != nil {
					return err
				}
			}
			return remover.Remove(c.Context(), key)
		}
		if !*recursive {
			return cli.Each(c, args, remove)
		}
		all, damaged := list(c, s) // records of damaged snapshots name no parent
		if all == nil && damaged != nil {
			return damaged
		}
		children := byParent(all)
		return cli.Each(c, args, func(key string) error {
			i, err := sn.Stat(c.Context(), key)
			if err != nil && !errdefs.IsFailedPrecondition(err) { // a copy that has lost properties can still be removed
				return err
			}
			return children.each(key, i.Kind == snapshot.Committed, remove)
		})
	}
	return c
}

// A family maps a snapshot's name to its children.
type family map[string][]snapshot.Info

func byParent(all []snapshot.Info) family {
	f := family{}
	for _, i := range all {
		f[i.Parent] = append(f[i.Parent], i)
	}
	for _, level := range f {
		slices.SortFunc(level, func(a, b snapshot.Info) int { return strings.Compare(a.Key, b.Key) })
	}
	return f
}

// each calls do for the descendants of a snapshot, children before parents, and then for the snapshot itself. A
// snapshot that is not committed has none, even if another one has its name.
func (f family) each(key string, committed bool, do func(key string) error) error {
	if committed {
		children := f[key]
		delete(f, key) // records may refer to each other in a circle
		for _, i := range children {
			if err := f.each(i.Key, i.Kind == snapshot.Committed, do); err != nil {
				return err
			}
		}
	}
	return do(key)
}

func newLabel(s *store) *cobra.Command {
	c := &cobra.Command{Use: "label [flags] KEY [KEY=VALUE…]", Short: "set a snapshot's labels, and print them", Args: cobra.MinimumNArgs(1)}
	r := cli.NewRecords(c, "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		sn, err := s.open(c.Context())
		if err != nil {
			return err
		}
		l, err := cli.Labels(args[1:])
		if err != nil {
			return err
		}
		info, err := sn.Stat(c.Context(), args[0])
		if err == nil && len(l) > 0 {
			info, err = sn.Update(c.Context(), snapshot.Info{Key: args[0], Labels: l}, cli.LabelPaths(l)...)
		}
		if err != nil {
			return err
		}
		return r.WriteLabels(info.Labels)
	}
	return c
}

func labelFlag(c *cobra.Command) *[]string {
	return c.Flags().StringArray("label", nil, "label it `KEY=VALUE` (can be repeated)")
}

func noSyncFlag(c *cobra.Command) *bool {
	return c.Flags().Bool("no-sync", false, "don't wait for the disk")
}

// zero registers -z for verbs that read keys but print no records.
func zero(c *cobra.Command) {
	c.Flags().BoolP("zero", "z", false, "with -, keys end with NUL instead of newline")
}
