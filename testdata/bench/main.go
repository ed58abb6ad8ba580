// Bench runs commands in turn, many times each, and prints for every one the median wall
// time, from fork to reaped, and its ratio to the first; the median CPU time, of it and the
// processes it waited for; and the largest memory of one of them.
//
//	bench [-n RUNS] [-before COMMAND] NAME=COMMAND…
//
// COMMAND is split at spaces, and {n} in it stands for the number of the run. In turn, so that a machine whose speed drifts does not favour one.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	runs := flag.Int("n", 40, "how often each runs")
	before := flag.String("before", "", "run `COMMAND` before each, untimed")
	flag.Parse()
	if err := bench(*runs, strings.Fields(*before), flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(runs int, before, commands []string) error {
	type subject struct {
		name  string
		args  []string
		times []time.Duration
		cpu   []time.Duration
		peak  int64
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
			if len(before) > 0 {
				if err := exec.Command(before[0], before[1:]...).Run(); err != nil {
					return fmt.Errorf("%v: %w", before, err)
				}
			}
			args := slices.Clone(s.args)
			for j := range args {
				args[j] = strings.ReplaceAll(args[j], "{n}", strconv.Itoa(i))
			}
			c := exec.Command(args[0], args[1:]...)
			start := time.Now()
			if err := c.Run(); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if i >= 2 {
				s.times = append(s.times, time.Since(start))
				s.cpu = append(s.cpu, c.ProcessState.UserTime()+c.ProcessState.SystemTime())
				s.peak = max(s.peak, c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
			}
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "command\tmedian ms\tmin ms\tratio\tcpu ms\tpeak MiB\t")
	var base float64
	for _, s := range all {
		slices.Sort(s.times)
		slices.Sort(s.cpu)
		median := s.times[len(s.times)/2]
		if base == 0 {
			base = median.Seconds()
		}
		fmt.Fprintf(w, "%s\t%.2f\t%.2f\t%.2f\t%.0f\t%.1f\t\n", s.name, 1000*median.Seconds(), 1000*s.times[0].Seconds(), median.Seconds()/base,
			1000*s.cpu[len(s.cpu)/2].Seconds(), float64(s.peak)/1024)
	}
	return w.Flush()
}
