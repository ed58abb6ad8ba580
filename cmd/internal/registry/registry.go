// Package registry has the flags of all commands that talk to a registry.
package registry

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/refname"
	"distkit/remotes"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

// environment lists variables that have the same meaning as a flag. Helpers get them too, but for the headers (remotes.Options).
var environment = []struct{ name, flag string }{
	{"DIST_CA", "ca"}, {"DIST_DEBUG", "debug"}, {"DIST_HEADERS", "header"}, {"DIST_HOSTS_DIR", "hosts-dir"},
	{"DIST_INSECURE", "insecure"}, {"DIST_MAX_WAIT", "max-wait"}, {"DIST_PLAIN_HTTP", "plain-http"}, {"DIST_TIMEOUT", "timeout"},
}

// Flags registers the flags that say how to reach registries; each has an environment variable. The options are
// complete once the command runs.
func Flags(c *cobra.Command) *remotes.Options {
	// net/http logs invalid responses of servers.
	log.SetOutput(io.Discard)
	o := &remotes.Options{}
	f := c.Flags()
	wrong := func(flag, what string, err error) {
		c.PreRunE = func(c *cobra.Command, _ []string) error {
			if what != "--"+flag && c.Flags().Changed(flag) {
				return nil // the flag overrides the variable
			}
			return cli.Usagef("%s: %w", what, err)
		}
	}
	f.StringVar(&o.AuthFile, "auth-file", "", "credentials in the form of docker's config.json are in `FILE` (env REGISTRY_AUTH_FILE)")
	f.StringArrayVar(&o.CA, "ca", nil, "trust the authorities in `FILE`, too (env DIST_CA)")
	f.Func("header", "send `NAME:VALUE`, or the lines of @FILE, to the registry (env DIST_HEADERS=FILE)", func(s string) error {
		lines, err := headers(s)
		if err != nil {
			wrong("header", "--header", err) // without the value, which a flag's own error would show
		}
		o.Headers = append(o.Headers, lines...)
		return nil
	})
	f.StringVar(&o.HostsDir, "hosts-dir", remotes.DefaultHostsDir, "`DIR` with containerd's hosts.toml of each host (env DIST_HOSTS_DIR)")
	f.BoolVar(&o.Insecure, "insecure", false, "take certificates without verifying them (env DIST_INSECURE)")
	o.MaxWait = time.Minute
	f.Var(&duration{&o.MaxWait, true}, "max-wait", "wait at most `DURATION` when a registry asks to (env DIST_MAX_WAIT)")
	f.BoolVar(&o.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to the host (env DIST_PLAIN_HTTP)")
	f.Var(&duration{value: &o.Timeout}, "timeout", "give up a host that sends nothing for `DURATION`: 2m, or 30s for a mirror, unless given (env DIST_TIMEOUT)")
	tell := func(s string) { cli.Report(c, errors.New(s)) }
	o.Notify = tell
	f.BoolFuncP("debug", "v", "show each request, without secrets, on standard error (env DIST_DEBUG)", func(s string) error {
		on, err := strconv.ParseBool(s)
		if o.Debug = nil; on {
			o.Debug = tell
		}
		return err
	})
	for _, v := range environment {
		values := []string{os.Getenv(v.name)}
		switch {
		case values[0] == "":
			continue
		case v.flag == "ca":
			values = filepath.SplitList(values[0])
		case v.flag == "header":
			values[0] = "@" + values[0]
		}
		for _, value := range values {
			if err := f.Lookup(v.flag).Value.Set(value); err != nil {
				wrong(v.flag, v.name, err)
			}
		}
	}
	return o
}

// BatchFlag registers --batch, which replaces the operands behind LOCATOR.
func BatchFlag(c *cobra.Command, usage string) *bool {
	many := c.Flags().Bool("batch", false, usage)
	c.Args = func(c *cobra.Command, args []string) error {
		if *many {
			return cobra.ExactArgs(1)(c, args)
		}
		return cobra.MinimumNArgs(1)(c, args)
	}
	return many
}

// Object takes the operands LOCATOR OBJECT [HINT…], or REF [HINT…], apart. A single operand is a REF. It has a tag or digest: without one,
// an OBJECT that was an unset variable would be taken for latest. An OBJECT behind a REF is a usage error: as a hint, it would be ignored.
func Object(args []string) (locator, object string, hints []string, err error) {
	if len(args) > 1 && !remotes.IsReference(args[0]) {
		return args[0], args[1], args[2:], nil
	}
	ref, err := remotes.ParseReference(args[0])
	switch {
	case err != nil:
	case !ref.Explicit:
		err = cli.Usagef("an OBJECT is missing: write %s OBJECT, or %[1]s:TAG", ref.Locator)
	case len(args) > 1 && isObject(args[1]):
		err = cli.Usagef("%.200q has a tag or digest already: leave %.200q out, or write %s %[2]s", args[0], args[1], ref.Locator)
	}
	return ref.Locator, ref.Object, args[1:], err
}

// isObject reports whether an operand is a tag, a digest or a full name, and so no hint.
func isObject(s string) bool {
	algorithm, _, _ := strings.Cut(s, ":")
	return refname.IsTag(s) || digest.Algorithm(algorithm).Available() || remotes.IsReference(s)
}

// Remotes opens remotes, each once: with one connection and one token for all that is asked of it.
type Remotes struct {
	options *remotes.Options
	opened  map[string]remotes.Remote // by locator
}

// NewRemotes returns Remotes that are opened with the options, as they are by then.
func NewRemotes(o *remotes.Options) *Remotes {
	return &Remotes{o, map[string]remotes.Remote{}}
}

// Open opens the remote of a locator.
func (m *Remotes) Open(locator string) (remotes.Remote, error) {
	if r := m.opened[locator]; r != nil {
		return r, nil
	}
	r, err := remotes.Open(locator, *m.options)
	if err == nil {
		m.opened[locator] = r
	}
	return r, err
}

// Objects takes the operands LOCATOR OBJECT…, or REF…, apart. If the first operand can only be a REF, or is alone and has a tag or digest, all
// are REFs. list is what stands for the objects; open opens the remote of one of them and returns the tag or digest that it has there.
func (m *Remotes) Objects(args []string) (list []string, open func(string) (r remotes.Remote, object string, err error), err error) {
	alone, err := remotes.ParseReference(args[0])
	if remotes.IsReference(args[0]) || len(args) == 1 && err == nil && alone.Explicit {
		return args, func(s string) (remotes.Remote, string, error) {
			ref, err := remotes.ParseReference(s)
			if err != nil || !ref.Explicit {
				return nil, "", cli.Usagef("%.200q has no tag and no digest, or is no reference: write LOCATOR:TAG", s)
			}
			r, err := m.Open(ref.Locator)
			return r, ref.Object, err
		}, nil
	}
	r, err := m.Open(args[0])
	return args[1:], func(object string) (remotes.Remote, string, error) { return r, object, nil }, err
}

// batchMemory is what the garbage collector keeps a batch to if it can.
const batchMemory = 20 << 20

// Batch calls serve to answer the requests on standard input for a remote.
func Batch(c *cobra.Command, locator string, o remotes.Options, serve func(context.Context, remotes.Remote, io.Reader, io.Writer) error) error {
	r, err := remotes.OpenBatch(locator, o)
	if err != nil {
		return err
	}
	in, err := cli.Stdin(c.Context())
	if err != nil {
		return err
	}
	defer in.Close()
	// Few large buffers take most of the memory, so collecting them early costs little.
	debug.SetMemoryLimit(batchMemory)
	return serve(c.Context(), r, in, cli.Stdout)
}

// duration is a flag for a positive length of time. Where 0 is allowed to mean "none", it is stored as a negative
// number, since in remotes.Options 0 means the default.
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

// maxHeaders bounds a file of headers.
const maxHeaders = 64 << 10

// headers parses one header, or the lines of @FILE. Its errors show no values, which may be secret.
func headers(s string) ([]string, error) {
	if name, ok := strings.CutPrefix(s, "@"); ok {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		var lines []string
		scanner := bufio.NewScanner(io.LimitReader(f, maxHeaders))
		scanner.Buffer(nil, maxHeaders)
		for scanner.Scan() {
			if line := strings.TrimSpace(scanner.Text()); line != "" {
				lines = append(lines, line)
			}
		}
		return lines, scanner.Err()
	}
	if i := strings.IndexAny(s, ":="); i > 0 {
		return []string{s[:i] + ":" + s[i+1:]}, nil
	}
	return nil, errors.New("a header is NAME:VALUE, or @FILE")
}
