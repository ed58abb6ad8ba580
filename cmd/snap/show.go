package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/spf13/cobra"
)

func newLs(s *store) *cobra.Command {
	c := &cobra.Command{Use: "ls [flags] [FILTER…]", Short: "list the snapshots: key, parent, kind", Args: cobra.ArbitraryArgs}
	r := cli.NewRecords(c, "KEY", "PARENT", "KIND")
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := filter.Parse(args)
		if err != nil {
			return err
		}
		all, err := list(c, s)
		slices.SortFunc(all, func(a, b snapshot.Info) int { return strings.Compare(a.Key, b.Key) })
		for _, i := range all {
			if ok, err := wanted.Match(i); err != nil {
				return err
			} else if !ok {
				continue
			}
			if err := r.Write(i, i.Key, i.Parent, i.Kind); err != nil {
				return err
			}
		}
		return cmp.Or(r.Close(), err)
	}
	return c
}

// list returns the snapshots that can be read. Its error may be about others.
func list(c *cobra.Command, s *store) ([]snapshot.Info, error) {
	sn, err := s.open(c.Context())
	if err != nil {
		return nil, err
	}
	var all []snapshot.Info
	err = sn.Walk(c.Context(), func(_ context.Context, i snapshot.Info) error {
		all = append(all, i)
		return nil
	})
	return all, err
}

func newStat(s *store) *cobra.Command {
	c := &cobra.Command{Use: "stat [flags] KEY…|-", Short: "print what is known of snapshots", Args: cobra.ArbitraryArgs}
	r := cli.NewRecords(c, "KEY", "PARENT", "KIND", "CREATED", "UPDATED", "LABELS")
	c.RunE = func(c *cobra.Command, args []string) error {
		sn, err := s.open(c.Context())
		if err != nil {
			return err
		}
		err = cli.Each(c, args, func(key string) error {
			i, err := sn.Stat(c.Context(), key)
			if err != nil {
				return err
			}
			return r.Write(i, i.Key, i.Parent, i.Kind, i.Created, i.Updated, cli.LabelWords(i.Labels))
		})
		return cmp.Or(err, r.Close())
	}
	return c
}

func newUsage(s *store) *cobra.Command {
	c := &cobra.Command{Use: "usage [flags] [KEY…|-]", Short: "print what snapshots take: bytes, inodes", Args: cobra.ArbitraryArgs}
	r := cli.NewRecords(c, "KEY", "SIZE", "INODES")
	c.RunE = func(c *cobra.Command, args []string) error {
		var damaged error
		if len(args) == 0 {
			var all []snapshot.Info
			all, damaged = list(c, s)
			for _, i := range all {
				args = append(args, i.Key)
			}
			slices.Sort(args)
		}
		sn, err := s.open(c.Context())
		if err != nil {
			return err
		}
		err = cli.Each(c, args, func(key string) error {
			u, err := sn.Usage(c.Context(), key)
			if err != nil {
				return err
			}
			v := struct {
				Key string `json:"key"`
				snapshot.Usage
			}{key, u}
			return r.Write(v, key, cli.Size(u.Size), u.Inodes)
		})
		return cmp.Or(damaged, err, r.Close())
	}
	return c
}

func newTree(s *store) *cobra.Command {
	c := &cobra.Command{Use: "tree [flags]", Short: "draw the snapshots below their parents", Args: cobra.NoArgs}
	c.RunE = func(c *cobra.Command, _ []string) error {
		all, err := list(c, s)
		children := byParent(all)
		out := c.OutOrStdout()
		width, tty := cli.IsTerminal(os.Stdout)
		if tty && err == nil && len(all) == 0 {
			cli.TellNoStore(c)
		}
		var draw func(parent, indent string)
		draw = func(parent, indent string) {
			level := children[parent]
			for n, i := range level {
				mark, below := "├── ", "│   "
				switch {
				case parent == "":
					mark, below = "", ""
				case n == len(level)-1:
					mark, below = "└── ", "    "
				}
				line := fmt.Sprintf("%s%s%s (%s)", indent, mark, i.Key, i.Kind)
				if tty {
					line = cli.Fit(line, width)
				}
				fmt.Fprintln(out, line)
				if i.Kind == snapshot.Committed {
					draw(i.Key, indent+below)
				}
			}
		}
		draw("", "")
		return err
	}
	return c
}

func newDrivers(s *store) *cobra.Command {
	c := &cobra.Command{Use: "drivers [flags]", Short: "list the drivers, and why one can't work here", Args: cobra.NoArgs}
	r := cli.NewRecords(c, "DRIVER", "STATE", "REASON")
	c.RunE = func(*cobra.Command, []string) error {
		for _, d := range drivers.List(c.Context(), *s.root) {
			state := "works"
			switch {
			case !d.Works:
				state = "unusable"
			case d.Default:
				state = "default"
			}
			if err := r.Write(d, d.Driver, cli.State(state), cli.Text(d.Reason)); err != nil {
				return err
			}
		}
		return r.Close()
	}
	return c
}
