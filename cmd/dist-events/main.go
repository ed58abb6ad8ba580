// Dist-events prints the log of what changed in a store.
package main

import (
	"errors"
	"os"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/filter"
	"distkit/content"
	"distkit/events"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

// pause is the interval of polling with --follow. The log is opened by name and without a lock, so this works on every
// file system.
const pause = 100 * time.Millisecond

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-events [flags] [FILTER…]",
		Short: "print the log of changes to a store",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root := cli.Root(f)
	follow := f.BoolP("follow", "f", false, "go on with what changes from now on, until a signal")
	since := f.String("since", "", "only events since `TIME`: RFC 3339, a date, or how long ago, as 90m")
	tail := f.IntP("tail", "n", -1, "of the events that are logged already, only the last `N`")
	stop := f.IntP("max-count", "m", -1, "stop after `N` events")
	asJSON := f.Bool("json", false, "print JSON objects also on a terminal")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *tail < 0 && f.Changed("tail") || *stop < 0 && f.Changed("max-count") {
			return cli.Usagef("--tail and --max-count are not negative")
		}
		p := printer{out: c.OutOrStdout(), left: *stop}
		if _, tty := cli.IsTerminal(os.Stdout); tty && !*asJSON {
			p.line = line
			defer func() {
				if p.printed == 0 {
					cli.TellNoStore(c)
				}
			}()
		}
		var err error
		if p.filter, err = filter.Parse(args); err != nil {
			return err
		}
		if p.since, err = parseTime(*since, time.Now()); err != nil {
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
		if *tail >= 0 {
			n, err := log.Count(p.wants)
			if err != nil {
				return err
			}
			p.skip = max(0, n-*tail)
		}
		for p.left != 0 {
			err := log.Read(p.print)
			if errors.Is(err, errEnough) {
				return nil
			}
			if err != nil || !*follow {
				return err
			}
			p.skip = 0
			if err := cli.Flush(c); err != nil {
				return err
			}
			select {
			case <-c.Context().Done():
				return c.Context().Err()
			case <-time.After(pause):
			}
		}
		return nil
	}
	return c
}
