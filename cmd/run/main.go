// Command run runs an OCI bundle.
package main

import (
	"fmt"

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
		Short:       "Run an OCI bundle and exit with its status, or leave it running",
		Args:        cobra.ExactArgs(1),
		Annotations: map[string]string{cli.ForwardsSignals: "", cli.RunsCommand: ""},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	o := containers.NewFlags(f)
	o.Runtime(f)
	var rec runtime.Record
	f.StringVar(&rec.ID, "id", "", "the container's `ID` (default: made up)")
	detach := f.BoolP("detach", "d", false, "print the ID once the process runs, and leave it running")
	f.BoolVar(&rec.RemoveAtEnd, "rm", false, "remove a detached container at its end")
	f.BoolVarP(&rec.Interactive, "interactive", "i", false, "give a detached process an input for task attach")
	labels := f.StringArray("label", nil, "label the container `KEY=VALUE` (can be repeated)")
	logSize := f.String("log-size", "", "the `SIZE` at which a detached process's log is put aside (default: 16MiB)")
	c.RunE = func(c *cobra.Command, args []string) (err error) {
		rec.Bundle = args[0]
		if rec.Labels, err = cli.Labels(*labels); err != nil {
			return err
		}
		if rec.LogSize, err = containers.Size(*logSize); err != nil {
			return err
		}
		status, err := run(c, o, rec, *detach)
		if err != nil {
			if runtime.Told(err) {
				return cli.Exit(runtime.ExitStatus(err))
			}
			return cli.ExitWith(runtime.ExitStatus(err), err)
		}
		if status != 0 {
			return cli.Exit(status)
		}
		return nil
	}
	return c
}

func run(c *cobra.Command, o *containers.Flags, rec runtime.Record, detach bool) (int, error) {
	all, err := o.Open()
	if err != nil {
		return 0, err
	}
	r, err := o.Find("")
	if err != nil {
		return 0, err
	}
	if !detach {
		return all.RunBundle(c.Context(), r, rec)
	}
	started, _, err := all.StartBundle(c.Context(), r, rec)
	if err == nil {
		_, err = fmt.Fprintln(c.OutOrStdout(), started.ID)
	}
	return 0, err
}
