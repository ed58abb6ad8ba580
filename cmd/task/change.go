package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newStart(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "start [flags] ID…|-", Short: "start containers in the background, and print their IDs", Args: cobra.ArbitraryArgs}
	which := containers.RuntimeFlags(c.Flags(), o)
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return each(c, args, func(id string) error {
			t, err := get(o, id)
			if err == nil && !t.HasUserNamespace() {
				err = containers.BeRoot()
			}
			if err != nil {
				return err
			}
			r, err := which.Find(t.Runtime)
			if err != nil {
				return err
			}
			if _, err := t.Start(c.Context(), r); err != nil {
				return err
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), id)
			return err
		})
	}
	return c
}

func newTrust(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "trust ID…|-", Short: "let containers be started that this user did not make on this host", Args: cobra.ArbitraryArgs}
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return cli.Each(c, args, func(id string) error {
			t, err := get(o, id)
			if err != nil {
				return err
			}
			return t.Trust()
		})
	}
	return c
}

func newRm(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "rm [flags] ID…|-", Short: "remove containers; of one, exit with its status", Args: cobra.ArbitraryArgs, Annotations: passesOn()}
	force := c.Flags().BoolP("force", "f", false, "kill what runs, mind no absence, and no record that can't be read; exit with 0 once it is removed")
	owner := c.Flags().Int("owner", 0, "remove only what the process `PID` has made and is to run (create --owner): all of that if no ID is given")
	exec := c.Flags().String("exec-id", "", "remove the ended process `EXECID` of task exec --detach alone")
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		one := len(args) == 1 && args[0] != "-"
		if *owner != 0 && len(args) == 0 {
			all, err := o.Open()
			if err != nil {
				return err
			}
			made, err := all.List(false) // the containers that can be read, beside an error for others
			if err != nil && !*force {
				return err
			}
			for _, t := range made {
				args = append(args, t.ID) // those of other owners are skipped below
			}
		}
		return eachOr(c, args, one, func(id string) error {
			all, err := o.Open()
			if err != nil {
				return err
			}
			t, err := all.Get(id)
			if *force {
				if t, err = all.Any(id); isNotFound(err) {
					return nil
				}
			}
			if err != nil {
				return err
			}
			if *owner != 0 && (t.Owner == nil || t.Owner.Pid != *owner || !t.Owner.Alive()) {
				return nil
			}
			if err := containers.Join(t); err != nil {
				return err
			}
			p, err := t.Process(*exec)
			if err != nil {
				return err
			}
			e, err := p.Remove(c.Context(), *force)
			if one && (errors.Is(err, fs.ErrPermission) || errdefs.IsPermissionDenied(err)) && os.Geteuid() != 0 {
				err = errors.Join(err, containers.BeRoot()) // its files may need that
			}
			if err != nil || !one || *force {
				return err
			}
			if e != nil && e.Status == nil {
				return nil // nobody saw the end, which is not a failure of this command
			}
			return passOn("container "+id, e)
		})
	}
	return c
}

// eachOr calls f for one argument, and returns its error as the command's, or calls f for each argument.
func eachOr(c *cobra.Command, args []string, one bool, f func(string) error) error {
	if one {
		return f(args[0])
	}
	return each(c, args, f)
}

func newLabel(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "label [flags] ID [KEY=VALUE…]", Short: "set a container's labels, and print them", Args: cobra.MinimumNArgs(1)}
	r := cli.NewRecords(c, "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		labels, err := cli.Labels(args[1:])
		if err != nil {
			return err
		}
		t, err := get(o, args[0])
		if err != nil {
			return err
		}
		now := t.Labels
		if len(labels) > 0 {
			if now, err = t.Label(labels); err != nil {
				return err
			}
		}
		return r.WriteLabels(now)
	}
	return c
}

func newKill(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "kill [flags] ID…|-", Short: "send a signal to containers' processes", Args: cobra.ArbitraryArgs}
	f := c.Flags()
	name := f.StringP("signal", "s", "TERM", "the `SIGNAL`, a name or a number")
	all := f.BoolP("all", "a", false, "to all processes in the container")
	exec := f.String("exec-id", "", "to the process `EXECID` of task exec")
	pid := f.Int("pid", 0, "to the one process `PID`, as task ps has it")
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		sig, err := spec.ParseSignal(*name)
		if err != nil {
			return err
		}
		if (*all && *exec != "") || (*all || *exec != "") && *pid != 0 {
			return cli.Usagef("--all, --exec-id and --pid exclude each other")
		}
		return each(c, args, func(id string) error {
			t, err := join(o, id)
			switch {
			case err != nil:
				return err
			case *pid != 0:
				return t.KillPid(*pid, sig)
			case *all:
				return t.KillAll(c.Context(), sig)
			}
			p, err := t.Process(*exec)
			if err != nil {
				return err
			}
			return p.Kill(c.Context(), sig)
		})
	}
	return c
}

func newStop(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "stop [flags] ID…|-", Short: "end containers, by their images' signal, and kill what has not ended after a while", Args: cobra.ArbitraryArgs}
	f := c.Flags()
	name := f.StringP("signal", "s", "", "the `SIGNAL`, a name or a number (default: the image's, else TERM)")
	seconds := f.IntP("timeout", "t", 10, "the `SECONDS` until it is killed; -1 is never")
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) (err error) {
		var sig unix.Signal
		if *name != "" {
			if sig, err = spec.ParseSignal(*name); err != nil {
				return err
			}
		}
		return each(c, args, func(id string) error {
			t, err := join(o, id)
			if err != nil {
				return err
			}
			return t.Stop(c.Context(), sig, time.Duration(*seconds)*time.Second)
		})
	}
	return c
}

func newPause(o *containers.Flags) *cobra.Command {
	return newEach(o, "pause", "stop containers' processes until task resume", (*runtime.Container).Pause)
}

func newResume(o *containers.Flags) *cobra.Command {
	return newEach(o, "resume", "let paused containers go on", (*runtime.Container).Resume)
}

// newEach makes a verb that does one thing to each container, and prints nothing.
func newEach(o *containers.Flags, verb, short string, do func(*runtime.Container, context.Context) error) *cobra.Command {
	c := &cobra.Command{Use: verb + " [flags] ID…|-", Short: short, Args: cobra.ArbitraryArgs}
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return each(c, args, func(id string) error {
			t, err := join(o, id)
			if err != nil {
				return err
			}
			return do(t, c.Context())
		})
	}
	return c
}

// zero registers -z for verbs that read IDs but print no records.
func zero(c *cobra.Command) {
	c.Flags().BoolP("zero", "z", false, "with -, IDs end with NUL instead of newline")
}

// command formats a command line for people.
func command(words []string) string { return strings.Join(words, " ") }
