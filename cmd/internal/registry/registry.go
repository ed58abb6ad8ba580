// Package registry holds the flags of every command that talks to a registry.
package registry

import (
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"distkit/remotes"

	"github.com/spf13/cobra"
)

// Flags registers --auth-file, --plain-http, --hosts-dir (env DIST_HOSTS_DIR), --max-wait and
// --debug.
// The options are complete once the flags are parsed.
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
	f.DurationVar(&o.MaxWait, "max-wait", time.Minute, "wait at most `DURATION` when a registry asks to")
	tell := func(s string) { fmt.Fprintf(os.Stderr, "%s: %s\n", c.Name(), s) }
	o.Notify = tell
	f.BoolFuncP("debug", "v", "show each request, without secrets, on standard error", func(string) error {
		o.Debug = tell
		return nil
	})
	return o
}
