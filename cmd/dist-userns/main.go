// Command dist-userns runs a command as root of a user namespace.
package main

import (
	"fmt"
	"os"
	"os/exec"

	"distkit/cmd/internal/cli"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() {
	if os.Args[0] == inside {
		become(os.Args[1:])
	}
	c := &cobra.Command{
		Use:         "dist-userns [flags] -- COMMAND [ARG…]",
		Short:       "run a command as root of a user namespace",
		Args:        cobra.MinimumNArgs(1),
		Annotations: map[string]string{cli.RunsCommand: "", cli.ForwardsSignals: ""},
	}
	c.Flags().SetInterspersed(false)
	classed := c.Flags().Bool("classed", false, "exit with the class of an own failure instead of 125")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *classed {
			delete(c.Annotations, cli.RunsCommand)
		}
		path, err := exec.LookPath(args[0])
		if err != nil {
			return cli.NotStarted(err)
		}
		if os.Geteuid() == 0 {
			return cli.NotStarted(fmt.Errorf("%s: %w", path, unix.Exec(path, args, os.Environ())))
		}
		m, err := mappings()
		if err != nil {
			return err
		}
		return m.run(path, args)
	}
	cli.Main(c)
}
