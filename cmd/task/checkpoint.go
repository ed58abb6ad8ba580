package main

import (
	"fmt"
	"slices"

	"distkit/cmd/internal/checkpoint"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/specflags"
	"distkit/content"
	"distkit/runtime/spec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
)

func newCheckpoint(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "checkpoint [flags] ID", Short: "store a running container as it is, and print the index's digest", Args: cobra.ExactArgs(1)}
	exit := c.Flags().Bool("exit", false, "end the container then")
	c.RunE = func(c *cobra.Command, args []string) error {
		t, err := join(o, args[0])
		if err != nil {
			return err
		}
		store, err := content.Open(o.Root())
		if err != nil {
			return err
		}
		dgst, err := checkpoint.Save(c.Context(), store, o.Snapshots(), t, *exit)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.OutOrStdout(), dgst)
		return err
	}
	return c
}

func newRestore(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "restore [flags] ID DIGEST", Short: "start a container that task create made where a checkpoint left off, and print its ID", Args: cobra.ExactArgs(2),
		Annotations: map[string]string{cli.ForwardsSignals: ""}}
	foreground := c.Flags().Bool("foreground", false, "as run does: wait for the end, and exit with the process's status")
	inherit := containers.InheritStdio(c.Flags())
	which := containers.RuntimeFlags(c.Flags(), o)
	grant := specflags.Grants(c.Flags())
	grant.Network("", "the network: none, host, or a namespace's `PATH` (default: none if the checkpoint had a network of its own)")
	c.RunE = func(c *cobra.Command, args []string) error {
		dgst, err := checkpoint.ParseDigest(args[1])
		if err != nil {
			return err
		}
		grants, err := grant.Options()
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(grants.Mounts, func(m specs.Mount) bool { return m.Type == spec.VolumeType }); i >= 0 {
			return cli.Usagef("a checkpoint's mounts are granted by their paths: not --volume %s", grants.Mounts[i].Source)
		}
		if len(grants.CDI) > 0 {
			return cli.Usagef("a checkpoint's devices are granted by their paths: not --device %s", grants.CDI[0])
		}
		t, err := get(o, args[0])
		if err == nil {
			err = containers.BeRoot()
		}
		if err != nil {
			return err
		}
		if err := which.CheckDetached(!*foreground); err != nil {
			return err
		}
		r, err := which.Find(t.Runtime)
		if err != nil {
			return err
		}
		store, err := content.Open(o.Root())
		if err != nil {
			return err
		}
		err = checkpoint.Load(c.Context(), store, t, dgst, grants)
		if err != nil {
			if t.RemoveAtEnd {
				_, _ = t.Remove(c.Context(), false)
			}
			return err
		}
		t.FromCheckpoint()
		if *foreground {
			return containers.Ended(t.Run(c.Context(), r, containers.Streams(*inherit)))
		}
		if _, err := t.Start(c.Context(), r); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.OutOrStdout(), t.ID)
		return err
	}
	return c
}
