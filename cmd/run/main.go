// Command run runs an OCI bundle.
package main

import (
	"fmt"
	"os"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"

	"github.com/spf13/cobra"
)

func main() {
	runtime.Shim(containers.Open)
	cli.Main(newCommand())
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:         "run [flags] BUNDLE",
		Short:       "run an OCI bundle",
		Args:        cobra.ExactArgs(1),
		Annotations: map[string]string{cli.ForwardsSignals: "", cli.RunsCommand: ""},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	o := containers.NewFlags(f)
	which := containers.RuntimeFlags(f, o)
	flags := containers.Record(f)
	f.StringVar(&flags.ID, "id", "", "the container's `ID` (default: made up)")
	detach := f.BoolP("detach", "d", false, "print the ID once the process runs, and leave it running")
	inherit := containers.InheritStdio(f)
	c.MarkFlagsMutuallyExclusive("detach", "inherit-stdio")
	c.RunE = func(c *cobra.Command, args []string) error {
		rec, err := flags.Get()
		if err == nil {
			err = which.CheckDetached(*detach)
		}
		if err != nil {
			return err
		}
		rec.Bundle, rec.Runtime = args[0], which.Name()
		if os.Geteuid() != 0 && !runtime.BundleHasUserNamespace(args[0]) { // only needed for an ordinary user
			if err := containers.BeRoot(); err != nil {
				return err
			}
		}
		return containers.Ended(run(c, o, which, rec, containers.Streams(*inherit), *detach))
	}
	return c
}

func run(c *cobra.Command, o *containers.Flags, which *containers.Runtime, rec runtime.Record, streams runtime.Streams, detach bool) (int, error) {
	all, err := o.Open()
	if err != nil {
		return 0, err
	}
	if !detach {
		return all.RunBundle(c.Context(), which.Find, rec, streams)
	}
	started, _, err := all.StartBundle(c.Context(), which.Find, rec)
	if err == nil {
		_, err = fmt.Fprintln(c.OutOrStdout(), started.ID)
	}
	return 0, err
}
