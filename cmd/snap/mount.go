package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/snapshot"
	"distkit/snapshot/erofs"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func newMounts(s *store) *cobra.Command {
	c := &cobra.Command{Use: "mounts [flags] KEY", Short: "print the mounts that show a snapshot", Args: cobra.ExactArgs(1)}
	target := c.Flags().StringP("target", "t", "", "print the mount(8) commands that mount it on `DIR` instead")
	c.RunE = func(c *cobra.Command, args []string) error {
		sn, err := s.open(c.Context())
		if err != nil {
			return err
		}
		mounts, err := sn.Mounts(c.Context(), args[0])
		if err != nil {
			return err
		}
		if *target == "" {
			return printMounts(c, mounts)
		}
		for _, m := range mounts {
			line, err := command(m, *target)
			if err != nil {
				return fmt.Errorf("mounts of %s: %w", args[0], err)
			}
			fmt.Fprintln(c.OutOrStdout(), line)
		}
		return nil
	}
	return c
}

func printMounts(c *cobra.Command, mounts []snapshot.Mount) error {
	e := json.NewEncoder(c.OutOrStdout())
	e.SetEscapeHTML(false)
	return e.Encode(mounts)
}

// command returns a mount as a shell command with mount(8).
func command(m snapshot.Mount, target string) (string, error) {
	target, err := filepath.Abs(target)
	if err != nil {
		return "", err
	}
	o := strings.Join(m.Options, ",")
	if m.Type == erofs.Name {
		return "", errdefs.ErrNotImplemented.WithMessage("mount(8) can't mount an EROFS image on files that hold its data: use snap mount")
	}
	if len(o) >= os.Getpagesize() {
		return "", errdefs.ErrFailedPrecondition.WithMessage("the options are longer than a page, which mount(8) can't pass on: use snap mount")
	}
	return fmt.Sprintf("mount -t %s -o %s %s %s", cli.Quote(m.Type), cli.Quote(o), cli.Quote(m.Source), cli.Quote(target)), nil
}

func newMount(s *store) *cobra.Command {
	c := &cobra.Command{Use: "mount [flags] KEY DIR", Short: "mount a snapshot on a directory", Args: cobra.ExactArgs(2)}
	mount := mountFlags(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		sn, err := s.open(c.Context())
		if err != nil {
			return err
		}
		return mount(sn, args[0], args[1])
	}
	return c
}

// mountFlags registers the flags for mounts, and returns a function that mounts a snapshot with them.
func mountFlags(c *cobra.Command) func(sn *snapshot.Snapshotter, key, target string) error {
	noSuid := c.Flags().Bool("nosuid", false, "set-user-ID bits of its programs have no effect (of a view they have none unless --nosuid=false)")
	noExec := c.Flags().Bool("noexec", false, "its programs can't be executed")
	noDev := c.Flags().Bool("nodev", false, "its device files can't be opened (those of a view can't unless --nodev=false)")
	return func(sn *snapshot.Snapshotter, key, target string) error {
		i, err := sn.Stat(c.Context(), key)
		if err != nil {
			return err
		}
		o := snapshot.DefaultMountOptions(i.Kind)
		if c.Flags().Changed("nosuid") {
			o.NoSuid = *noSuid
		}
		if c.Flags().Changed("nodev") {
			o.NoDev = *noDev
		}
		o.NoExec = *noExec
		return sn.MountWith(c.Context(), key, target, o)
	}
}

func newUmount(*store) *cobra.Command {
	c := &cobra.Command{
		Use: "umount [flags] DIR…|-", Short: "unmount what snap mount mounted", Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error {
			return cli.Each(c, args, snapshot.Unmount)
		},
	}
	zero(c)
	return c
}
