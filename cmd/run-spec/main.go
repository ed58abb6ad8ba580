// Command run-spec turns an image's configuration into a container's runtime specification.
package main

import (
	"bytes"
	"encoding/json"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/specflags"
	"distkit/runtime/spec"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "run-spec [flags] [CMD…]",
		Short: "turn an image config into an OCI runtime spec",
		Args:  cobra.ArbitraryArgs,
	}
	c.Flags().SetInterspersed(false)
	flags := specflags.Register(c.Flags())
	flags.Annotations("label", "the same as --annotation `NAME=VALUE`")
	flags.Network("none", "the network: host, none, or a namespace's `PATH`")
	c.RunE = func(c *cobra.Command, args []string) error {
		o, err := flags.Options()
		if err != nil {
			return err
		}
		if len(o.Joins()) > 0 {
			return cli.Usagef("container:ID is for task create and dist-run; run-spec takes a namespace's path")
		}
		if o.UserNS.Auto {
			return cli.Usagef("--userns auto is for task create and dist-run; run-spec takes the IDs")
		}
		o.Args = args
		in, err := cli.Stdin(c.Context())
		if err != nil {
			return err
		}
		defer in.Close()
		img, err := spec.ReadImage(in)
		if err != nil {
			return err
		}
		s, err := spec.New(img, o)
		if err != nil {
			return err
		}
		b, err := specflags.Document(c.Context(), s, o.CDI)
		if err != nil {
			return err
		}
		var out bytes.Buffer
		if err := json.Indent(&out, b, "", "\t"); err != nil {
			return err
		}
		_, err = c.OutOrStdout().Write(out.Bytes())
		return err
	}
	return c
}
