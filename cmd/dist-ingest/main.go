// Dist-ingest stores standard input, or what a command writes, as a verified blob.
package main

import (
	"distkit/cmd/internal/cli"
	"distkit/content"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-ingest [flags] [REF] [-- COMMAND…]",
		Short: "store standard input as a verified blob",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root := cli.Root(f)
	expected := f.String("expected-digest", "", "store only a blob of this `DIGEST`")
	size := f.Int64("expected-size", 0, "store only a blob of this many `BYTES`")
	keep := f.Bool("keep", false, "keep what failed verification")
	noWait := f.Bool("no-wait", false, "fail if another process stores the same blob")
	out := cli.NewRecords(c, "DIGEST", "SIZE")
	c.RunE = func(c *cobra.Command, args []string) error {
		in := ingest{expected: digest.Digest(*expected), size: -1, keep: *keep, wait: !*noWait}
		if f.Changed("expected-size") {
			if in.size = *size; in.size < 0 {
				return cli.Usagef("--expected-size %d is negative", in.size)
			}
		}
		if dash := c.ArgsLenAtDash(); dash >= 0 {
			args, in.command = args[:dash], args[dash:]
			if len(in.command) == 0 {
				return cli.Usagef("a command must follow --; usage: %s", c.UseLine())
			}
		}
		switch {
		case len(args) > 1:
			return cli.Usagef("one REF only, and -- before a command; usage: %s", c.UseLine())
		case len(args) == 1:
			in.ref = args[0]
		case *expected == "":
			return cli.Usagef("a REF or --expected-digest is needed; usage: %s", c.UseLine())
		default:
			in.ref = *expected
		}
		if f.Changed("expected-digest") {
			if err := content.Validate(in.expected); err != nil {
				return err
			}
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		r, err := in.run(c.Context(), s)
		if err != nil {
			return err
		}
		if err := out.Write(r, r.Digest, cli.Size(r.Size)); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}
