// Bench runs commands in turn, many times each, and prints for every one the median wall
// time, and its ratio to the first: what a process costs from fork to reaped.
//
//	bench [-n RUNS] NAME=COMMAND…
//
// COMMAND is split at spaces. In turn, so that a machine whose speed drifts does not favour one.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

func main() {
	runs := flag.Int("n", 40, "how often each runs")
	flag.Parse()
	if err := bench(*runs, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(runs int, commands []string) error {
	type subject struct {
		name  string
		args  []string
		times []time.Duration
	}
	var all []*subject
	for _, c := range commands {
		name, line, ok := strings.Cut(c, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=COMMAND", c)
		}
		all = append(all, &subject{name: name, args: strings.Fields(line)})
	}
	for i := range runs + 2 { // two rounds to warm up
		for _, s := range all {
			c := exec.Command(s.args[0], s.args[1:]...)
			start := time.Now()
			if err := c.Run(); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if i >= 2 {
				s.times = append(s.times, time.Since(start))
			}
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "command\tmedian ms\tmin ms\tratio\t")
	var base float64
	for _, s := range all {
		slices.Sort(s.times)
		median := s.times[len(s.times)/2]
		if base == 0 {
			base = median.Seconds()
		}
		fmt.Fprintf(w, "%s\t%.2f\t%.2f\t%.2f\t\n", s.name, 1000*median.Seconds(), 1000*s.times[0].Seconds(), median.Seconds()/base)
	}
	return w.Flush()
}
