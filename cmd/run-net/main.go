// Command run-net makes network namespaces for containers, connected by CNI plugins.
package main

import (
	"context"
	"encoding/json"

	"fmt"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/specflags"
	"distkit/runtime"
	"distkit/runtime/network"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{Use: "run-net VERB", Short: "connect containers to networks"}
	o := options{}
	f := c.PersistentFlags()
	o.namespace = cli.Namespace(f)
	o.state = f.String("state", os.Getenv("DIST_STATE"), "the `DIR` for what runs (env DIST_STATE) (default: /run/distkit)")
	c.AddCommand(newAdd(o), newDel(o), newDown(o), newLs(o), newPath(o), newPlan(o), newUp(o))
	return c
}

type options struct{ namespace, state *string }

func (o options) open() (*network.Networks, error) {
	state := *o.state
	if state == "" {
		state = runtime.DefaultState()
	}
	return network.Open(state, *o.namespace, network.PluginDirs())
}

func newAdd(o options) *cobra.Command {
	c := &cobra.Command{Use: "add [flags] ID", Short: "make a network, and print its namespace's path and its addresses", Args: cobra.ExactArgs(1)}
	w := newWanted(c, network.Bridge)
	out := records(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := w.get()
		if err != nil {
			return err
		}
		all, err := o.open()
		if err != nil {
			return err
		}
		n, err := all.Add(c.Context(), args[0], *wanted)
		if err != nil {
			return err
		}
		if err := write(out, n); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}

// wanted are the flags that describe a network.
type wanted struct {
	name, dir *string
	publish   *[]string
	names     *spec.Names
}

func newWanted(c *cobra.Command, name string) wanted {
	f := c.Flags()
	w := wanted{
		name:    f.String("network", name, "the `NAME` or file of CNI's configuration; bridge needs none; pasta, or pasta:host-loopback, is for an ordinary user"),
		dir:     f.String("conf-dir", "/etc/cni/net.d", "the `DIR` of CNI's configurations (env NETCONFPATH)"),
		publish: f.StringArrayP("publish", "p", nil, "let a port of the host lead to one of the network: `[IP:]HOST:PORT[/PROTOCOL]` (can be repeated)"),
		names:   specflags.Names(f),
	}
	f.StringVar(&w.names.Hostname, "hostname", "", "the host `NAME` by which the other networks find this one (default: the ID)")
	if env := os.Getenv("NETCONFPATH"); env != "" {
		*w.dir = env
	}
	return w
}

// get returns nil if no network is named.
func (w wanted) get() (*network.Wanted, error) {
	if *w.name == "" {
		if len(*w.publish) > 0 || w.names.Given() || w.names.Hostname != "" {
			return nil, cli.Usagef("--publish, and what is for names, need a --network")
		}
		return nil, nil
	}
	return network.Find(runtime.Connection{Name: *w.name, ConfDir: *w.dir, Ports: *w.publish, Names: *w.names})
}

// newPlan makes the verb that task create runs before it makes a container, so that task need not link CNI.
func newPlan(o options) *cobra.Command {
	c := &cobra.Command{Use: "plan [flags] ID", Short: "check what is asked for a network, and print, in JSON, where it and its files would be", Args: cobra.ExactArgs(1)}
	w := newWanted(c, network.Bridge)
	c.RunE = func(c *cobra.Command, args []string) error {
		wanted, err := w.get()
		if err != nil {
			return err
		}
		all, err := o.open()
		if err != nil {
			return err
		}
		p := runtime.NetworkPlan{Connection: wanted.Connection()}
		if p.Path, p.Files, err = all.Paths(args[0]); err != nil {
			return err
		}
		servers, err := wanted.Resolves()
		if err != nil {
			return err
		}
		if !servers {
			fmt.Fprintln(c.ErrOrStderr(), "run-net: this host's resolv.conf has no name server that a network reaches, so names will not resolve: give one with --dns")
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(p)
	}
	return c
}

func newDel(o options) *cobra.Command {
	return o.each("del [flags] ID|PATH…|-", "take networks away; those that aren't there are gone", (*network.Networks).Delete)
}

func newDown(o options) *cobra.Command {
	return o.each("down [flags] ID|PATH…|-", "disconnect networks until run-net up; those that aren't there are gone", (*network.Networks).Down)
}

func newUp(o options) *cobra.Command {
	var w wanted
	c := o.each("up [flags] ID|PATH…|-", "connect networks that are down as they were; with --network, make those that are gone", func(n *network.Networks, ctx context.Context, id string) error {
		wanted, err := w.get()
		if err != nil {
			return err
		}
		if _, err = n.Up(ctx, id); !errdefs.IsNotFound(err) || wanted == nil {
			return err
		}
		_, err = n.Add(ctx, id, *wanted)
		return err
	})
	w = newWanted(c, "")
	return c
}

// each makes a verb that does one thing to each network, given by ID or path, and prints nothing.
func (o options) each(use, short string, do func(*network.Networks, context.Context, string) error) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.MinimumNArgs(1)}
	c.Flags().BoolP("zero", "z", false, "the IDs of standard input end with NUL instead of newline")
	c.RunE = func(c *cobra.Command, args []string) error {
		all, err := o.open()
		if err != nil {
			return err
		}
		return cli.Each(c, args, func(id string) error {
			of := all
			if strings.Contains(id, "/") {
				var err error
				if of, id, err = all.Locate(id); err != nil {
					return err
				}
			}
			return do(of, c.Context(), id)
		})
	}
	return c
}

func newLs(o options) *cobra.Command {
	c := &cobra.Command{Use: "ls [flags]", Short: "list networks", Args: cobra.NoArgs}
	out := records(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		all, err := o.open()
		if err != nil {
			return err
		}
		list, err := all.List(c.Context())
		if err != nil {
			return err
		}
		for _, n := range list {
			if err := write(out, n); err != nil {
				return err
			}
		}
		return out.Close()
	}
	return c
}

func newPath(o options) *cobra.Command {
	return &cobra.Command{
		Use: "path [flags] ID", Short: "print the path that the ID's network namespace has, or would have", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			all, err := o.open()
			if err != nil {
				return err
			}
			path, _, err := all.Paths(args[0])
			if err == nil {
				_, err = fmt.Fprintln(c.OutOrStdout(), path)
			}
			return err
		},
	}
}

func records(c *cobra.Command) *cli.Records {
	return cli.NewRecords(c, "PATH", "ID", "NETWORK", "ADDRESSES", "PORTS")
}

func write(out *cli.Records, n *network.Network) error {
	var ports []string
	for _, p := range n.Ports {
		ports = append(ports, fmt.Sprint(p))
	}
	return out.Write(n, n.Path, n.ID, n.Name, strings.Join(n.Addresses, ","), strings.Join(ports, ","))
}
