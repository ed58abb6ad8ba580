// Dist-edit edits a blob in an editor and stores the outcome as a new blob.
package main

import (
	"errors"
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-edit [flags] DIGEST",
		Short: "edit a blob in an editor and store the outcome as a new blob",
		Args:  cobra.ExactArgs(1),
	}
	root := cli.Root(c.Flags())
	validate := c.Flags().Bool("validate", false, "store only a manifest, an index or an image config")
	out := cli.NewRecords(c, "DIGEST", "SIZE")
	c.RunE = func(c *cobra.Command, args []string) error {
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		e := edit{store: s, editor: editor()}
		if *validate {
			e.check = image.Validate
		}
		old := digest.Digest(args[0])
		r, err := e.run(c.Context(), old)
		if errors.Is(err, errInterrupted) {
			cli.DieBy(unix.SIGINT) // as the editor died
		}
		if err != nil {
			return fmt.Errorf("edit %s: %w", old, err)
		}
		if r.Digest == old && !out.Quiet() {
			fmt.Fprintf(c.ErrOrStderr(), "%s: %s: unchanged\n", c.Name(), old)
		}
		if err := out.Write(r, r.Digest, cli.Size(r.Size)); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}
