// Command run runs an OCI bundle in the foreground.
package main

import (
	"os"

	"distkit/cmd/internal/cli"
	"distkit/runtime"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:         "run [flags] BUNDLE",
		Short:       "Run an OCI bundle in the foreground and exit with its status",
		Args:        cobra.ExactArgs(1),
		Annotations: map[string]string{cli.ForwardsSignals: "", cli.RunsCommand: ""},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	id := f.String("id", "", "the container's `ID` (default: made up)")
	namespace := cli.Namespace(f)
	name := f.String("runtime", "", "the OCI runtime's `NAME` or path (default: runc, else crun)")
	state := f.String("state", "", "the `DIR` for what runs (env DIST_STATE) (default: /run/distkit, or the user's runtime directory)")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *state == "" {
			*state = os.Getenv("DIST_STATE")
		}
		status, err := run(c, *state, *name, *namespace, *id, args[0])
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

func run(c *cobra.Command, state, name, namespace, id, bundle string) (int, error) {
	if state == "" {
		state = runtime.DefaultState()
	}
	if id == "" {
		id = runtime.NewID()
	}
	key, err := runtime.Key(namespace, id)
	if err != nil {
		return 0, err
	}
	r, err := runtime.Find(name, state)
	if err != nil {
		return 0, err
	}
	return r.Run(c.Context(), key, bundle)
}
