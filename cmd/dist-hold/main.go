// Command dist-hold runs a command while it keeps the store from being swept.
package main

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() {
	c := &cobra.Command{
		Use:         "dist-hold [flags] -- COMMAND [ARG…]",
		Short:       "run a command while garbage collection is held off",
		Args:        cobra.MinimumNArgs(1),
		Annotations: map[string]string{cli.RunsCommand: ""},
	}
	c.Flags().SetInterspersed(false)
	root := cli.Root(c.Flags())
	classed := c.Flags().Bool("classed", false, "exit with the class of an own failure instead of 125")
	existing := c.Flags().Bool("existing", false, "fail if there is no store, instead of creating one")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *classed {
			delete(c.Annotations, cli.RunsCommand)
		}
		path, err := exec.LookPath(args[0])
		if err != nil {
			return cli.NotStarted(err)
		}
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		if *existing {
			if there, err := store.Exists(); err != nil || !there {
				return cmp.Or(err, errclass.Errorf(errdefs.ErrNotFound, "no store at %s", store.Root()))
			}
		}
		hold, err := store.Hold(c.Context())
		if err != nil {
			return err
		}
		// The command replaces this process, so signals and the exit status are its own.
		return cli.NotStarted(fmt.Errorf("%s: %w", path, unix.Exec(path, args, append(os.Environ(), hold))))
	}
	cli.Main(c)
}
