package main

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"

	"github.com/spf13/cobra"
)

// processColumns are the columns that task ps can print.
var processColumns = []struct {
	name string
	cell func(runtime.InContainer) any
}{
	{"pid", func(p runtime.InContainer) any { return p.Pid }},
	{"inside", func(p runtime.InContainer) any { return p.Inside }},
	{"ppid", func(p runtime.InContainer) any { return p.Parent }},
	{"uid", func(p runtime.InContainer) any { return p.UID }},
	{"started", func(p runtime.InContainer) any { return p.Started }},
	{"exec", func(p runtime.InContainer) any { return p.Exec }},
	{"command", func(p runtime.InContainer) any { return command(p.Command) }},
	// These are not printed unless they are asked for.
	{"user", func(p runtime.InContainer) any { return userName(p.UID) }},
	{"etime", func(p runtime.InContainer) any { return time.Since(p.Started).Truncate(time.Second) }},
	{"time", func(p runtime.InContainer) any { return time.Duration(p.CPU) }},
	{"rss", func(p runtime.InContainer) any { return cli.Size(p.RSS) }},
	{"args", func(p runtime.InContainer) any { return command(p.Command) }},
}

// userName is the host's name for a user, or its number.
func userName(uid int) string {
	number := strconv.Itoa(uid)
	passwd, _ := os.ReadFile("/etc/passwd")
	for line := range strings.Lines(string(passwd)) {
		if words := strings.Split(line, ":"); len(words) == 7 && words[2] == number {
			return words[0]
		}
	}
	return number
}

func newPs(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "ps [flags] ID", Short: "list the processes in a container", Args: cobra.ExactArgs(1)}
	var names []string
	for _, col := range processColumns {
		names = append(names, col.name)
	}
	r := cli.NewRecords(c, "PID")
	wanted := c.Flags().StringSliceP("columns", "o", names[:7], "the `COLUMNS`, of "+strings.Join(names, ", "))
	c.RunE = func(c *cobra.Command, args []string) error {
		var cells []func(runtime.InContainer) any
		var headers []string
		for _, name := range *wanted {
			i := slices.Index(names, name)
			if i < 0 {
				return cli.Usagef("--columns: there is no column %q: want some of %s", name, strings.Join(names, ","))
			}
			cells, headers = append(cells, processColumns[i].cell), append(headers, strings.ToUpper(name))
		}
		if len(cells) == 0 {
			return cli.Usagef("--columns wants some of %s", strings.Join(names, ","))
		}
		r.Columns(headers...)
		t, err := join(o, args[0])
		if err != nil {
			return err
		}
		all, err := t.Processes()
		if err != nil {
			return err
		}
		for _, p := range all {
			row := make([]any, len(cells))
			for i, cell := range cells {
				row[i] = cell(p)
			}
			if err := r.Write(p, row...); err != nil {
				return err
			}
		}
		return r.Close()
	}
	return c
}
