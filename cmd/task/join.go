package main

import (
	"errors"
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/spf13/cobra"
)

func newWait(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "wait [flags] ID", Short: "wait for a container's end, and exit with its status", Args: cobra.ExactArgs(1), Annotations: passesOn()}
	exec := c.Flags().String("exec-id", "", "wait for the process `EXECID` of task exec")
	c.RunE = func(c *cobra.Command, args []string) error {
		p, err := joinProcess(o, args[0], *exec)
		if err != nil {
			return err
		}
		e, err := p.Wait(c.Context())
		if err != nil {
			return err
		}
		return passOn("container "+args[0], e)
	}
	return c
}

func newAttach(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{
		Use: "attach [flags] ID", Short: "join a detached container, and exit with its status", Args: cobra.ExactArgs(1),
		Annotations: map[string]string{cli.RunsCommand: "", cli.ForwardsSignals: ""},
	}
	keys := c.Flags().String("detach-keys", "ctrl-p,ctrl-q", "the `KEYS` that leave it when typed on its terminal")
	noInput := c.Flags().Bool("no-stdin", false, "give it no input")
	exec := c.Flags().String("exec-id", "", "join the process `EXECID` of task exec --detach")
	c.RunE = func(c *cobra.Command, args []string) error {
		p, err := joinProcess(o, args[0], *exec)
		if err != nil {
			return err
		}
		a := runtime.Attach{Input: !*noInput}
		if a.DetachKeys, err = stdio.ParseDetachKeys(*keys); err != nil {
			return err
		}
		e, err := p.Attach(c.Context(), a)
		var missing stdio.Missing
		if errors.As(err, &missing) && e != nil && e.Status != nil && *e.Status != 0 {
			cli.Report(c, err) // then exit with the process's status
			err = nil
		}
		if err != nil {
			return err
		}
		if e == nil { // detached by the keys, with the terminal's cursor anywhere
			_, err = fmt.Fprintf(c.ErrOrStderr(), "\ntask: left %s, which runs on\n", args[0])
			return err
		}
		return passOn("container "+args[0], e)
	}
	return c
}

func newExec(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{
		Use: "exec [flags] ID COMMAND [ARG…]", Short: "run a command in a container, and exit with its status", Args: cobra.MinimumNArgs(2),
		Annotations: map[string]string{cli.RunsCommand: "", cli.ForwardsSignals: ""},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	var x runtime.Exec
	f.StringVar(&x.ID, "exec-id", "", "the process's `EXECID` (default: made up)")
	f.StringArrayVarP(&x.Env, "env", "e", nil, "set the variable `NAME=VALUE`; NAME alone takes it from here")
	f.StringVarP(&x.Cwd, "cwd", "w", "", "the working `DIR`")
	f.StringVarP(&x.User, "user", "u", "", "the `USER[:GROUP]`, names or numbers")
	f.BoolVarP(&x.Terminal, "terminal", "t", false, "give it a terminal")
	f.BoolVarP(&x.Interactive, "interactive", "i", false, "give a detached process an input for task attach")
	inherit := containers.InheritStdio(f)
	detach := f.BoolP("detach", "d", false, "print the EXECID once the process runs, and leave it running")
	c.MarkFlagsMutuallyExclusive("detach", "inherit-stdio")
	c.RunE = func(c *cobra.Command, args []string) error {
		t, err := join(o, args[0])
		if err != nil {
			return err
		}
		x.Args, x.Streams = args[1:], containers.Streams(*inherit)
		for i, v := range x.Env {
			x.Env[i] = spec.ParseEnv(v)
		}
		if *detach {
			id, err := t.StartExec(c.Context(), x)
			if err != nil {
				return cli.ExitWith(runtime.ExitStatus(err), err)
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), id)
			return err
		}
		return containers.Ended(t.Exec(c.Context(), x))
	}
	return c
}
