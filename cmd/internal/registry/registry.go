// Package registry holds the flags of every command that talks to a registry.
package registry

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

// Flags registers --auth-file, --plain-http, --hosts-dir (env DIST_HOSTS_DIR), --max-wait, --timeout (env
// DIST_TIMEOUT) and --debug. The options are complete once the flags are parsed.
func Flags(c *cobra.Command) *remotes.Options {
	// net/http logs what strange servers send.
	log.SetOutput(io.Discard)
	o := &remotes.Options{}
	f := c.Flags()
	f.StringVar(&o.AuthFile, "auth-file", "", "credentials in the form of docker's config.json are in `FILE` (env REGISTRY_AUTH_FILE)")
	f.BoolVar(&o.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to the host")
	f.StringVar(&o.HostsDir, "hosts-dir", remotes.DefaultHostsDir, "`DIR` with containerd's hosts.toml of each host (env DIST_HOSTS_DIR)")
	if dir := os.Getenv("DIST_HOSTS_DIR"); dir != "" {
		o.HostsDir = dir
	}
	o.MaxWait = time.Minute
	f.Var(&duration{&o.MaxWait, true}, "max-wait", "wait at most `DURATION` when a registry asks to")
	timeout := &duration{value: &o.Timeout}
	f.Var(timeout, "timeout", "give up a host that sends nothing for `DURATION`: 2m, or 30s for a mirror, unless given (env DIST_TIMEOUT)")
	if text := os.Getenv("DIST_TIMEOUT"); text != "" {
		err := timeout.Set(text)
		c.PreRunE = func(c *cobra.Command, _ []string) error {
			if err != nil && !c.Flags().Changed("timeout") {
				return cli.Usagef("DIST_TIMEOUT=%q: %w", text, err)
			}
			return nil
		}
	}
	tell := func(s string) { fmt.Fprintf(os.Stderr, "%s: %s\n", c.Name(), s) }
	o.Notify = tell
	f.BoolFuncP("debug", "v", "show each request, without secrets, on standard error", func(string) error {
		o.Debug = tell
		return nil
	})
	return o
}

// duration is a flag of a length of time, which is positive. Where it may be none, 0 is kept as a negative one: in
// remotes.Options, 0 stands for the default.
type duration struct {
	value     *time.Duration
	mayBeNone bool
}

func (d *duration) Set(s string) error {
	v, err := time.ParseDuration(s)
	switch {
	case err != nil:
		return errors.New("write a number with a unit, such as 90s or 10m")
	case v < 0 || v == 0 && !d.mayBeNone:
		return errors.New("it must be positive")
	case v == 0:
		v = -1
	}
	*d.value = v
	return nil
}

func (d *duration) String() string {
	if d.value == nil || *d.value == 0 {
		return ""
	}
	return max(*d.value, 0).String()
}

func (d *duration) Type() string { return "duration" }
