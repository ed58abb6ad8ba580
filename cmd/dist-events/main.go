// Dist-events prints the log of what changed in a store.
package main

import (
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/content"
	"distkit/events"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

// pause is how often a log that is followed is looked at: without a lock, by name, so that it
// works on every file system.
const pause = 100 * time.Millisecond

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-events [flags] [FILTER…]",
		Short: "print the log of what changed in a store",
		Args:  cobra.ArbitraryArgs,
	}
	root := cli.Root(c.Flags())
	follow := c.Flags().BoolP("follow", "f", false, "go on with what changes from now on, until a signal")
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := filter.Parse(args)
		if err != nil {
			return err
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		log, err := events.Open(s.Root())
		if err != nil {
			return err
		}
		defer log.Close()
		for {
			err := log.Read(func(e events.Event, line []byte) error {
				if ok, err := wanted.Match(e); err != nil || !ok {
					return err
				}
				_, err := c.OutOrStdout().Write(line)
				return err
			})
			if err != nil || !*follow {
				return err
			}
			if err := cli.Flush(c); err != nil {
				return err
			}
			select {
			case <-c.Context().Done():
				return c.Context().Err()
			case <-time.After(pause):
			}
		}
	}
	return c
}
