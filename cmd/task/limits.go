package main

import (
	"errors"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/specflags"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/spf13/cobra"
)

func newStats(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "stats [flags] [ID…]", Short: "print what running containers use: processor nanoseconds, bytes, processes", Args: cobra.ArbitraryArgs}
	r := cli.NewRecords(c, "TASK", "CPU", "MEMORY", "LIMIT", "PROCESSES", "READ", "WRITTEN")
	follow := c.Flags().BoolP("follow", "f", false, "print again and again, until they have ended")
	interval := c.Flags().Duration("interval", time.Second, "with -f, the `DURATION` between")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *interval < time.Millisecond {
			return cli.Usagef("--interval %v is too short", *interval)
		}
		all, err := o.Open()
		if err != nil {
			return err
		}
		list := func() ([]*runtime.Container, error) {
			if len(args) == 0 {
				return all.List(true)
			}
			var named []*runtime.Container
			for _, id := range args {
				t, err := all.Get(id)
				if err != nil {
					return nil, err
				}
				named = append(named, t)
			}
			return named, nil
		}
		for first := true; ; first = false {
			some, err := list()
			if isNotFound(err) && !first {
				return nil // removed at its end
			}
			if err != nil && len(some) == 0 {
				return err
			}
			printed := 0
			for _, t := range some {
				s, err := t.Stats()
				if err != nil {
					if first && len(args) > 0 {
						return err
					}
					continue
				}
				printed++
				if err := r.Write(s, s.ID, time.Duration(s.CPU), cli.Size(s.Memory), cli.Limit(s.MemoryLimit), s.Processes, cli.Size(s.Read), cli.Size(s.Written)); err != nil {
					return err
				}
			}
			if !*follow || printed == 0 {
				return errors.Join(err, r.Close())
			}
			if err := errors.Join(r.Close(), cli.Flush(c)); err != nil {
				return err
			}
			select {
			case <-c.Context().Done():
				return c.Context().Err()
			case <-time.After(*interval):
			}
		}
	}
	return c
}

func newUpdate(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "update [flags] ID…|-", Short: "change what running containers may use", Args: cobra.ArbitraryArgs}
	limits := specflags.RegisterLimits(c.Flags())
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		l, err := limits.Get()
		if err != nil {
			return err
		}
		r, err := l.Resources(spec.ThisHost())
		if err != nil {
			return err
		}
		if r.Memory == nil && r.CPU == nil && r.Pids == nil {
			return cli.Usagef("nothing to change: give a limit")
		}
		return each(c, args, func(id string) error {
			t, err := join(o, id)
			if err != nil {
				return err
			}
			return t.Update(c.Context(), r)
		})
	}
	return c
}
