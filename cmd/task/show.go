package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/filter"
	"distkit/runtime"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func isNotFound(err error) bool { return errdefs.IsNotFound(err) }

func newLs(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "ls [flags] [FILTER…]", Short: "list the containers that have a process", Args: cobra.ArbitraryArgs}
	r := cli.NewRecords(c, "TASK", "PID", "STATUS", "EXIT", "CREATED", "IMAGE", "PORTS", "COMMAND")
	all := c.Flags().BoolP("all", "a", false, "those without a process too")
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := filter.Parse(args)
		if err != nil {
			return err
		}
		cs, err := o.Open()
		if err != nil {
			return err
		}
		list, lerr := cs.List(!*all) // some may be returned beside an error
		for _, t := range list {
			i, err := t.Info()
			if isNotFound(err) {
				continue // it has just been removed
			}
			if err != nil {
				lerr = errors.Join(lerr, err)
				continue
			}
			if !*all && i.Status != runtime.Running && i.Status != runtime.Paused {
				continue
			}
			if ok, err := wanted.Match(i); err != nil {
				return err
			} else if !ok {
				continue
			}
			if err := writeContainer(r, t, i); err != nil {
				return err
			}
		}
		return errors.Join(lerr, r.Close())
	}
	return c
}

// writeContainer writes a container's record.
func writeContainer(r *cli.Records, t *runtime.Container, i runtime.Info) error {
	if r.Quiet() {
		return r.Write(nil, i.ID)
	}
	l := struct {
		runtime.Info
		Command []string `json:"command,omitempty"`
	}{i, t.Command()}
	exit, image, ports := "", "", ""
	if i.Exit != nil && i.Exit.Status != nil {
		exit = strconv.Itoa(*i.Exit.Status)
	}
	if i.Image != nil {
		image = cmp.Or(i.Image.Name, i.Image.Digest)
	}
	if i.Connection != nil {
		ports = strings.Join(i.Connection.Ports, ",")
	}
	return r.Write(l, i.ID, i.Pid, cli.State(i.Status), exit, i.Created, image, ports, command(l.Command))
}

func newInfo(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "info [flags] ID…|-", Short: "print what is known of containers, in JSON", Args: cobra.ArbitraryArgs}
	zero(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		e := json.NewEncoder(c.OutOrStdout())
		e.SetEscapeHTML(false)
		return cli.Each(c, args, func(id string) error {
			t, err := get(o, id)
			if err != nil {
				return err
			}
			i, err := t.Info()
			if err != nil {
				return err
			}
			return e.Encode(i)
		})
	}
	return c
}

func newLogs(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "logs [flags] ID", Short: "print what a detached container has printed", Args: cobra.ExactArgs(1)}
	f := c.Flags()
	var l runtime.Logs
	f.BoolVarP(&l.Follow, "follow", "f", false, "go on until the container ends")
	f.IntVarP(&l.Tail, "tail", "n", -1, "begin with the last `LINES` alone")
	times := f.BoolP("timestamps", "t", false, "begin each line with its time")
	records := f.Bool("json", false, "print a JSON object for each piece of output: time, stream, text")
	exec := f.String("exec-id", "", "of the process `EXECID` of task exec --detach")
	c.RunE = func(c *cobra.Command, args []string) error {
		of, err := joinProcess(o, args[0], *exec)
		if err != nil {
			return err
		}
		p := printer{cmd: c, times: *times, json: *records}
		l.Idle = func() error { return cli.Flush(c) }
		err = of.Logs(c.Context(), l, p.print)
		if err == nil && p.missing {
			err = cli.Exit(1) // print has reported it already
		}
		return err
	}
	return c
}

// printer prints a log: standard output to standard output, standard error to standard error.
type printer struct {
	cmd         *cobra.Command
	times, json bool
	open        map[string]bool // streams whose last line is not complete yet
	missing     bool            // part of the log could not be read
}

func (p *printer) print(e stdio.Entry) (err error) {
	out := p.cmd.OutOrStdout()
	switch {
	case e.Missing > 0:
		p.missing = true
		if err := cli.Flush(p.cmd); err != nil {
			return err
		}
		cli.Report(p.cmd, stdio.Missing(e.Missing))
	case p.json:
		err = json.NewEncoder(out).Encode(struct {
			Time   time.Time `json:"time"`
			Stream string    `json:"stream"`
			Text   string    `json:"text"`
		}{e.Time(), e.Stream, string(e.Text)})
	default:
		if e.Stream == "stderr" {
			if err := cli.Flush(p.cmd); err != nil { // keeps the order of lines if both are one terminal
				return err
			}
			out = p.cmd.ErrOrStderr()
		}
		if p.times && !p.open[e.Stream] {
			if _, err := fmt.Fprintf(out, "%s ", e.Time().Format(time.RFC3339Nano)); err != nil {
				return err
			}
		}
		if p.open == nil {
			p.open = map[string]bool{}
		}
		p.open[e.Stream] = len(e.Text) == 0 || e.Text[len(e.Text)-1] != '\n'
		_, err = out.Write(e.Text)
	}
	return err
}
