// Dist-doctor tells what works on this machine.
package main

import (
	"cmp"
	"context"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

// The states of what is looked at.
const (
	ok      = "ok"
	limited = "limited" // some of what it is for doesn't work
	missing = "missing" // nothing of what it is for works
)

// finding is a record.
type finding struct {
	Subject string `json:"subject"`
	State   string `json:"state"`
	Found   string `json:"found"`
	Advice  string `json:"advice,omitempty"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-doctor [flags]",
		Short: "check what works on this machine",
		Args:  cobra.NoArgs,
	}
	root := cli.Root(c.Flags())
	remote := registry.Flags(c)
	out := cli.NewRecords(c, "SUBJECT", "STATE", "FOUND", "WHAT TO DO")
	c.RunE = func(c *cobra.Command, _ []string) error {
		checks := []func(context.Context) []finding{
			system, tools, user,
			func(ctx context.Context) []finding { return drivers(ctx, *root) },
			runtimes, cgroups, networks,
			func(context.Context) []finding { return store(*root) },
			func(context.Context) []finding { return hosts(*remote) },
			func(context.Context) []finding { return credentials(*remote) },
			names,
		}
		for _, check := range checks {
			for _, f := range check(c.Context()) {
				if err := out.Write(f, f.Subject, cli.State(f.State), cli.Text(f.Found), cli.Text(f.Advice)); err != nil {
					return err
				}
			}
			if err := c.Context().Err(); err != nil {
				return err
			}
		}
		return cmp.Or(out.Close(), c.Context().Err())
	}
	return c
}
