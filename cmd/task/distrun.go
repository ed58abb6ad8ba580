package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/create"
	"distkit/cmd/internal/specflags"
	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// distRun is the part of the script dist-run that parses flags and makes the container. The script calls it as `task
// dist-run --owner PID`. It writes the script's next step to descriptor 3: variables, then the words of a command, each
// ended by NUL. If it exits with 0, the script becomes that command. If it exits with 3, the script runs the command to
// fetch the image, and calls it again.
type distRun struct {
	of              *containers.Flags
	record          *containers.NewRecord
	spec            *specflags.Flags
	names           *spec.Names
	secrets         *create.SecretFlags
	which           *containers.Runtime
	made            *pflag.FlagSet // flags that describe the container, as in task create
	request         create.Request
	id, pull        string
	env             map[string]string // variables that have the meaning of a flag, by the flag's name
	detach, inherit *bool
	dryRun, trace   bool
	owner           int
	again           bool
	next            io.Writer
}

func newDistRun() *cobra.Command {
	c := &cobra.Command{
		Use:         "dist-run [flags] REF [CMD…] | --rootfs DIR CMD… | --restore DIGEST",
		Short:       "run a command in a container made from an image",
		Args:        cobra.ArbitraryArgs,
		Annotations: passesOn(),
	}
	f, made := c.Flags(), pflag.NewFlagSet("", pflag.ContinueOnError)
	f.SetInterspersed(false)
	d := &distRun{
		of: containers.NewFlags(f), record: containers.Record(made), spec: specflags.Register(made), names: specflags.Names(made), secrets: create.Secrets(made), made: made,
		env: map[string]string{"root": "DIST_ROOT", "namespace": "CONTAINERD_NAMESPACE", "state": "DIST_STATE", "snapshotter": "CONTAINERD_SNAPSHOTTER",
			"auth-file": "REGISTRY_AUTH_FILE", "hosts-dir": "DIST_HOSTS_DIR", "plain-http": "DIST_PLAIN_HTTP"},
	}
	d.which = containers.RuntimeFlags(f, d.of)
	q := &d.request
	networkFlags(made, &q.Network, &q.Publish)
	made.StringVar(&q.Platform, "platform", "", "the `PLATFORM` of an index (default: this machine's)")
	f.AddFlagSet(made)
	f.String("auth-file", "", "take credentials from `FILE`, in the form of docker's config.json (env REGISTRY_AUTH_FILE)")
	f.String("hosts-dir", "", "the `DIR` of hosts.toml files (env DIST_HOSTS_DIR)")
	f.Bool("plain-http", false, "plain HTTP instead of HTTPS (env DIST_PLAIN_HTTP)")
	f.StringVar(&d.pull, "pull", "missing", "`POLICY`: missing, always or never")
	f.StringVar(&q.Checkpoint, "restore", "", "go on where task checkpoint stored a container, by its `DIGEST`")
	f.StringVar(&q.Driver, "snapshotter", "", "the snapshot driver's `NAME` (env CONTAINERD_SNAPSHOTTER)")
	f.StringVar(&d.id, "id", "", "the container's `ID` (default: made up)")
	d.detach = f.BoolP("detach", "d", false, "print the container's ID once it runs, and leave it running")
	d.inherit = containers.InheritStdio(f)
	f.BoolVar(&d.dryRun, "dry-run", false, "print the steps, as commands for bash, instead of taking them")
	f.BoolVarP(&d.trace, "trace", "x", false, "print each step on standard error as it is taken, as a line for the shell")
	f.IntVar(&d.owner, "owner", 0, "")
	f.BoolVar(&d.again, "again", false, "")
	for _, n := range []string{"owner", "again"} {
		_ = f.MarkHidden(n)
	}
	c.MarkFlagsMutuallyExclusive("detach", "inherit-stdio")
	c.RunE = d.run
	return c
}

func (d *distRun) run(c *cobra.Command, args []string) error {
	q := &d.request
	switch {
	case d.pull != "missing" && d.pull != "always" && d.pull != "never":
		return cli.Usagef("--pull wants missing, always or never, got %q", d.pull)
	case q.Checkpoint != "" && (len(args) > 0 || q.Platform != "" || d.made.Changed("hostname")):
		return cli.Usagef("--restore goes on with what was stored: no REF or CMD, and no --platform or --hostname, fits it")
	case q.Checkpoint != "" || d.made.Changed("rootfs"):
		d.pull = ""
	case len(args) == 0:
		return cli.Usagef("a REF is missing; usage: %s", c.UseLine())
	default:
		q.Image, args = args[0], args[1:]
		if base := q.Image[strings.LastIndex(q.Image, "/")+1:]; !strings.ContainsAny(base, ":@") {
			q.Image += ":latest"
		}
	}
	if err := d.which.CheckDetached(*d.detach); err != nil {
		return err
	}
	if d.id == "" {
		d.id = runtime.NewID()
	}
	if d.dryRun {
		return d.print(c, args)
	}
	d.next = os.NewFile(3, "the script")
	var err error
	c.Flags().Visit(func(f *pflag.Flag) {
		if name := d.env[f.Name]; name != "" && err == nil {
			err = cmp.Or(os.Setenv(name, f.Value.String()), d.say(name+"="+f.Value.String())) // for this step and the later ones
		}
	})
	if err == nil && os.Geteuid() != 0 { // an ordinary user runs all steps as root of one user namespace
		if err = d.say("DIST_STATE=" + d.of.State()); err == nil { // paths must not change together with the user
			err = d.take(c, 0, append([]string{"dist-userns", "--", "dist-run"}, os.Args[d.given():]...)...)
		}
		return err
	}
	if err != nil {
		return err
	}
	if q.Record, err = d.record.Get(); err != nil {
		return err
	}
	if q.Spec, err = d.spec.Options(); err != nil {
		return err
	}
	if q.Secrets, err = d.secrets.Read(c.InOrStdin()); err != nil {
		return err
	}
	q.Spec.Args, q.Of, q.Names, q.Warnings = args, d.of, *d.names, c.ErrOrStderr()
	q.Warn = func(err error) { cli.Report(c, err) }
	q.Record.ID, q.Record.Runtime = d.id, d.which.Name()
	p, err := runtime.Identify(d.owner)
	if err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	q.Record.Owner = &p
	return d.step(c, args)
}

// step makes the container and writes the next step. If the image is missing, it writes the step that fetches it.
func (d *distRun) step(c *cobra.Command, args []string) error {
	q := &d.request
	if d.pull == "always" && !d.again {
		return d.take(c, 3, d.fetch()...)
	}
	if d.trace {
		fmt.Fprintln(c.ErrOrStderr(), words(d.create(args)))
	}
	made, err := q.Container(c.Context())
	switch {
	case err == nil:
		return d.take(c, 0, append(d.start(c), made.Dir())...)
	case errdefs.IsNotImplemented(err) && q.Checkpoint != "":
		return cli.ExitWith(10, err) // criu does not work here
	case !create.IsMissing(err) || d.again || d.pull == "":
		return err
	case d.pull == "never" || q.Here(c.Context()):
		return d.take(c, 3, d.unpack()...)
	}
	return d.take(c, 3, d.fetch()...)
}

// given returns the index of the first argument from dist-run's user. Those before it come from the script.
func (d *distRun) given() int {
	if d.again {
		return 4
	}
	return 3
}

// take writes the script's next step.
func (d *distRun) take(c *cobra.Command, status int, step ...string) error {
	if flag := cmp.Or(d.spec.ReadOnce(), d.secrets.ReadOnce()); flag != "" && status != 0 { // the script would call again, and the stream would be empty then
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "%s can't be read twice: bring the image here first, by %s", flag, words(step))
	}
	if d.trace {
		fmt.Fprintln(c.ErrOrStderr(), words(step))
	}
	if err := d.say(step...); err != nil || status == 0 {
		return err
	}
	return cli.Exit(status)
}

func (d *distRun) say(words ...string) error {
	_, err := io.WriteString(d.next, strings.Join(words, "\x00")+"\x00")
	return err
}

func (d *distRun) platform() []string {
	if d.request.Platform == "" {
		return nil
	}
	return []string{"--platform", d.request.Platform}
}

func (d *distRun) fetch() []string {
	return append(append([]string{"dist-pull"}, d.platform()...), "--unpack", "--", d.request.Image)
}

func (d *distRun) unpack() []string {
	return append(append([]string{"dist-unpack"}, d.platform()...), "--", d.request.Image)
}

// create returns the command that makes the same container.
func (d *distRun) create(args []string) []string {
	q := &d.request
	step := []string{"task", "create"}
	if q.Image != "" {
		step = append(step, "--image", q.Image)
	}
	if q.Checkpoint != "" {
		step = append(step, "--checkpoint", q.Checkpoint)
	}
	if name := d.which.Name(); name != "" {
		step = append(step, "--runtime", name)
	}
	d.made.VisitAll(func(f *pflag.Flag) {
		if !f.Changed {
			return
		}
		values := []string{f.Value.String()}
		if s, ok := f.Value.(pflag.SliceValue); ok {
			values = s.GetSlice()
		}
		for _, v := range values {
			step = append(step, "--"+f.Name+"="+v)
		}
	})
	return append(append(step, "--", d.id), args...)
}

// start returns the command that runs the container, without its directory.
func (d *distRun) start(c *cobra.Command) []string {
	step := []string{"run"}
	for _, name := range []string{"detach", "inherit-stdio", "cgroup-parent", "log"} {
		if f := c.Flags().Lookup(name); f.Changed {
			step = append(step, "--"+name+"="+f.Value.String())
		}
	}
	return step
}

// print prints all steps.
func (d *distRun) print(c *cobra.Command, args []string) error {
	out := c.OutOrStdout()
	if os.Geteuid() != 0 {
		fmt.Fprintf(out, "export DIST_STATE=%s\nexec dist-userns -- bash\n", cli.Quote(d.of.State()))
	}
	c.Flags().Visit(func(f *pflag.Flag) {
		if name := d.env[f.Name]; name != "" {
			fmt.Fprintf(out, "export %s=%s\n", name, cli.Quote(f.Value.String()))
		}
	})
	switch d.pull {
	case "always":
		fmt.Fprintf(out, "%s >/dev/null\n", words(d.fetch()))
	case "missing":
		check := append(append([]string{"dist-image", "check", "-q"}, d.platform()...), d.request.Image)
		fmt.Fprintf(out, "if %s >/dev/null 2>&1; then %s; else %s; fi >/dev/null\n", words(check), words(d.unpack()), words(d.fetch()))
	case "never":
		fmt.Fprintf(out, "%s >/dev/null\n", words(d.unpack()))
	}
	step := d.create(args)
	_, err := fmt.Fprintf(out, "dir=$(task create --owner $$ %s)\nexec %s \"$dir\"\n", words(step[2:]), words(d.start(c)))
	return err
}

// words formats a command for a shell.
func words(step []string) string {
	quoted := make([]string, len(step))
	for i, w := range step {
		quoted[i] = cli.Quote(w)
	}
	return strings.Join(quoted, " ")
}
