package main

import (
	"errors"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"
	"distkit/runtime/spec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
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
	f := c.Flags()
	memory := f.String("memory", "", "the most memory, as a `SIZE`; -1 is no limit")
	swap := f.String("memory-swap", "", "the most memory and swap together, as a `SIZE`; -1 is no limit (default: twice --memory)")
	cpus := f.Float64("cpus", 0, "the most processor time, in `CPUS`")
	shares := f.Uint64("cpu-shares", 0, "the `WEIGHT` of its processor time against others', 1024 being usual")
	set := f.String("cpuset-cpus", "", "the processors it may use, a `LIST` such as 0-2,5")
	mems := f.String("cpuset-mems", "", "the memory nodes it may use, a `LIST`")
	pids := f.Int64("pids", 0, "the most processes and threads, as a `NUMBER`; -1 is no limit")
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		var r specs.LinuxResources
		if *memory != "" {
			n, err := spec.ParseLimit(*memory)
			if err != nil {
				return err
			}
			r.Memory = spec.MemoryLimit(n, spec.ThisHost())
		}
		if *swap != "" {
			n, err := spec.ParseLimit(*swap)
			if err != nil {
				return err
			}
			if r.Memory == nil {
				r.Memory = &specs.LinuxMemory{}
			}
			r.Memory.Swap = &n
		}
		cpu := specs.LinuxCPU{Cpus: *set, Mems: *mems}
		if *cpus < 0 || *cpus > 0 && *cpus < 0.01 || *cpus > 1<<20 {
			return cli.Usagef("--cpus %v is not between 0.01 and 1048576", *cpus)
		}
		if *cpus > 0 {
			period := uint64(100_000)
			quota := int64(*cpus * float64(period))
			cpu.Period, cpu.Quota = &period, &quota
		}
		if *shares > 0 {
			cpu.Shares = shares
		}
		if cpu.Cpus != "" || cpu.Mems != "" || cpu.Quota != nil || cpu.Shares != nil {
			r.CPU = &cpu
		}
		if *pids != 0 {
			r.Pids = &specs.LinuxPids{Limit: pids}
		}
		if r.Memory == nil && r.CPU == nil && r.Pids == nil {
			return cli.Usagef("nothing to change: give a limit")
		}
		return each(c, args, func(id string) error {
			t, err := join(o, id)
			if err != nil {
				return err
			}
			return t.Update(c.Context(), &r)
		})
	}
	return c
}
