package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/console"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// commandEnv makes the test binary a command that runs under Main.
const commandEnv = "CLI_TEST_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(commandEnv) != "" {
		Main(testCommand())
	}
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if signal.Ignored(sig) {
			// Under nohup, it would ignore the signal. A caught signal is reset for children.
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	os.Exit(m.Run())
}

// testCommand does what its first argument says.
func testCommand() *cobra.Command {
	c := &cobra.Command{Use: "probe [flags] WHAT [ARG…]", Args: cobra.MinimumNArgs(1)}
	root, namespace := Root(c.Flags()), Namespace(c.Flags())
	records := NewRecords(c, "KEY", "SIZE", "AT")
	c.RunE = func(c *cobra.Command, args []string) error {
		switch args[0] {
		case "defaults":
			_, err := fmt.Fprintln(c.OutOrStdout(), *root, *namespace)
			return err
		case "exit":
			return Exit(77)
		case "table":
			records.Columns("DIGEST", "SIZE", "NAME")
			if err := records.Write(nil, args[1], Size(1024), args[2]); err != nil {
				return err
			}
			if err := records.Write(nil, "", Size(0), "x"); err != nil {
				return err
			}
			return records.Close()
		case "kinds":
			records.Columns("TYPE", "STATE")
			if err := records.Write(nil, MediaType(args[1]), State(args[2])); err != nil {
				return err
			}
			return records.Close()
		case "nothing":
			return records.Close()
		case "fail":
			return fmt.Errorf("open\n\x1b[31mred: %w", errdefs.ErrNotFound)
		case "failed":
			return fmt.Errorf("layer: %w", errors.Join(Exit(42), errors.New("and it stays")))
		case "wait":
			in, err := Stdin(c.Context())
			if err != nil {
				return err
			}
			defer in.Close()
			fmt.Fprintln(os.Stderr, "waiting")
			_, err = in.Read(make([]byte, 1))
			return err
		case "write", "copy":
			patience = time.Hour
			fmt.Fprintln(os.Stderr, "waiting")
			if args[0] == "write" {
				_, err := c.OutOrStdout().Write(make([]byte, 1<<20))
				return err
			}
			_, err := Stdout.ReadFrom(strings.NewReader(strings.Repeat("x", 1<<20)))
			return err
		case "each", "batch":
			bad := func(o string) error {
				if class := map[byte]error{'n': errdefs.ErrNotFound, 'b': errdefs.ErrUnavailable}[o[0]]; class != nil {
					return fmt.Errorf("object %q: %w", o, class)
				}
				return nil
			}
			done := func(o string) error {
				_, err := fmt.Fprintf(c.OutOrStdout(), "%q\n", o)
				return err
			}
			if args[0] == "each" {
				return Each(c, args[1:], func(o string) error {
					if err := bad(o); err != nil {
						return err
					}
					return done(o)
				})
			}
			return Batch(c, args[1:], func(objects []string) (errs []error, err error) {
				for _, o := range objects {
					if o == "a0" {
						return nil, fmt.Errorf("a batch of %d: %w", len(objects), errdefs.ErrDataLoss)
					}
					errs = append(errs, bad(o))
				}
				return errs, nil
			}, done)
		case "records":
			at := time.Date(2017, 1, 19, 0, 0, 0, 0, time.UTC)
			if err := records.Write(map[string]int{"size": 2048}, "a\tb\\n\n", Size(2048), at); err != nil {
				return err
			}
			return records.Close()
		}
		return Usagef("what is %s?", args[0])
	}
	return c
}

type result struct {
	out, errs string
	state     *os.ProcessState
}

func probe(t *testing.T, stdin string, env []string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	c := exec.Command(os.Args[0], args...)
	c.Env = append(append(os.Environ(), commandEnv+"=1"), env...)
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &errs
	var exit *exec.ExitError
	if err := c.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{out.String(), errs.String(), c.ProcessState}
}

func TestStatusOfEveryClass(t *testing.T) {
	both := errors.Join(errdefs.ErrFailedPrecondition, errdefs.ErrDataLoss)
	for want, errs := range map[int][]error{
		0:   {nil},
		1:   {errors.New("x"), errdefs.ErrInternal, errdefs.ErrUnknown},
		2:   {errdefs.ErrInvalidArgument, Usagef("x")},
		3:   {errdefs.ErrNotFound},
		4:   {errdefs.ErrDataLoss, both},
		5:   {errdefs.ErrUnavailable},
		6:   {errdefs.ErrAborted, context.DeadlineExceeded, errdefs.ErrResourceExhausted},
		7:   {errdefs.ErrAlreadyExists},
		8:   {errdefs.ErrFailedPrecondition},
		9:   {errdefs.ErrUnauthenticated, errdefs.ErrPermissionDenied, fs.ErrPermission, syscall.EROFS},
		10:  {errdefs.ErrNotImplemented},
		126: {Exit(126)},
	} {
		for _, err := range errs {
			if err != nil {
				err = fmt.Errorf("do x: %w", err)
			}
			if got := Status(err); got != want {
				t.Errorf("%v: status %d, want %d", err, got, want)
			}
		}
	}
}

func TestErrorsAreOneLineAndClassified(t *testing.T) {
	for _, c := range []struct {
		args   []string
		status int
		stderr string
	}{
		{[]string{"fail"}, 3, "probe: open; \\x1b[31mred: not found\n"},
		{[]string{"exit"}, 77, ""},
		{[]string{"what"}, 2, "probe: what is what?\n"},
		{[]string{}, 2, "probe: requires at least 1 arg(s), only received 0; usage: probe [flags] WHAT [ARG…]\n"},
		{[]string{"--namespcae", "x"}, 2, "probe: unknown flag: --namespcae: --namespace?; usage: probe [flags] WHAT [ARG…]\n"},
		{[]string{"--restart", "x"}, 2, "probe: unknown flag: --restart; usage: probe [flags] WHAT [ARG…]\n"},
		{[]string{"--nope"}, 2, "probe: unknown flag: --nope; usage: probe [flags] WHAT [ARG…]\n"},
		{[]string{""}, 2, "probe: WHAT is empty; usage: probe [flags] WHAT [ARG…]\n"},
		{[]string{"--root", "", "defaults"}, 2, "probe: --root is empty; usage: probe [flags] WHAT [ARG…]\n"},
		{[]string{"exit", ""}, 77, ""},
		{[]string{"completion"}, 2, "probe: what is completion?\n"},
	} {
		r := probe(t, "", nil, c.args...)
		if r.state.ExitCode() != c.status || r.errs != c.stderr || r.out != "" {
			t.Errorf("%q: %v, stderr %q, stdout %q", c.args, r.state, r.errs, r.out)
		}
	}
}

// Besides a status to pass on, a command may have its own error to report.
func TestWhatIsBesideAStatusIsReported(t *testing.T) {
	if r := probe(t, "", nil, "failed"); r.state.ExitCode() != 42 || r.errs != "probe: and it stays\n" {
		t.Errorf("status %d, %q", r.state.ExitCode(), r.errs)
	}
}

func TestDefaultsComeFromTheEnvironment(t *testing.T) {
	for want, env := range map[string][]string{
		".content default\n": {"DIST_ROOT=", "CONTAINERD_NAMESPACE="},
		"/r n\n":             {"DIST_ROOT=/r", "CONTAINERD_NAMESPACE=n"},
	} {
		if r := probe(t, "", env, "defaults"); r.out != want {
			t.Errorf("%v: %q", env, r.out)
		}
	}
	if r := probe(t, "", []string{"DIST_ROOT=/r"}, "--root", "/s", "defaults"); !strings.HasPrefix(r.out, "/s ") {
		t.Errorf("the flag over the environment: %q", r.out)
	}
	if r := probe(t, "", []string{"DIST_ROOT=/r"}, "--help"); !strings.Contains(r.out, `(default ".content")`) {
		t.Errorf("help depends on the environment: %s", r.out)
	}
}

func TestEach(t *testing.T) {
	for _, c := range []struct {
		stdin  string
		args   []string
		status int
		out    string
		errors int
	}{
		{"", nil, 0, "", 0},
		{"", []string{"-"}, 0, "", 0},
		{"x\n\ny", []string{"a", "-", "c"}, 0, "\"a\"\n\"x\"\n\"y\"\n\"c\"\n", 0},
		{"", []string{"n", "a", "n"}, 3, "\"a\"\n", 2},
		{"", []string{"n", "b", "a"}, 1, "\"a\"\n", 2},
		{"", []string{"n", "b", "b"}, 1, "", 3},
		{"x\ny\x00z", []string{"-z", "-"}, 0, "\"x\\ny\"\n\"z\"\n", 0},
		{strings.Repeat("x", maxObject+1), []string{"-"}, 2, "", 1},
		{"x\n" + strings.Repeat("y", maxObject+1), []string{"-"}, 2, "\"x\"\n", 1},
	} {
		for _, verb := range []string{"each", "batch"} {
			r := probe(t, c.stdin, nil, append([]string{verb}, c.args...)...)
			if r.state.ExitCode() != c.status || r.out != c.out || strings.Count(r.errs, "\n") != c.errors {
				t.Errorf("%s %q: %v, stdout %q, stderr %q", verb, c.args, r.state, r.out, r.errs)
			}
		}
	}
	// Objects are handled in batches. If a batch fails as a whole, the command ends, but earlier batches are done.
	many := strings.Repeat("a\n", maxBatch+10)
	if r := probe(t, many+"n\n", nil, "batch", "-"); r.state.ExitCode() != 3 || strings.Count(r.out, "\n") != maxBatch+10 {
		t.Errorf("%v, %d lines, stderr %q", r.state, strings.Count(r.out, "\n"), r.errs)
	}
	if r := probe(t, many+"a0\n", nil, "batch", "-"); r.state.ExitCode() != 4 || strings.Count(r.out, "\n") != maxBatch || r.errs != "probe: a batch of 11: data loss\n" {
		t.Errorf("%v, %d lines, stderr %q", r.state, strings.Count(r.out, "\n"), r.errs)
	}
}

func TestRecords(t *testing.T) {
	for want, args := range map[string][]string{
		`a\tb\\n\n` + "\t2048\t2017-01-19T00:00:00Z\n": {"records"},
		"a\tb\\n\\n\n":        {"-q", "records"},
		"a\tb\\n\n\x00":       {"-q", "-z", "records"},
		"{\"size\":2048}\n":   {"--json", "records"},
		"{\"size\":2048}\x00": {"--json", "-z", "records"},
		`a\tb\\n\n` + "\t2048\t2017-01-19T00:00:00Z\x00": {"-z", "records"},
	} {
		if r := probe(t, "", nil, args...); r.out != want || r.errs != "" {
			t.Errorf("%q: %q; stderr %q", args, r.out, r.errs)
		}
	}
}

// A table fits the terminal. Digests are shortened first.
func TestTables(t *testing.T) {
	const a, b = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "docker.io/library/redis:7.2@sha256:fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210"
	for width, want := range map[uint16]string{
		20:  "DIGEST  SIZE   NAME\r\n012…ab  1.0 …  do…54\r\n-       0 B    x\r\n",
		200: "DIGEST                                                                   SIZE     NAME\r\n" + a + "  1.0 KiB  " + b + "\r\n-                                                                        0 B      x\r\n",
		80:  "DIGEST        SIZE     NAME\r\n0123456789ab  1.0 KiB  docker.io/library/redis:7.2@sha256:fedcba987654\r\n-             0 B      x\r\n",
		40:  "DIGEST        SIZE     NAME\r\n0123456789ab  1.0 KiB  docker.i…ba987654\r\n-             0 B      x\r\n",
		5:   "…  …  …\r\n…  …  …\r\n-  …  x\r\n",
		0:   "DIGEST                                                                   SIZE     NAME\r\n" + a + "  1.0 KiB  " + b + "\r\n-                                                                        0 B      x\r\n",
	} {
		got := onTerminal(t, width, "table", a, b)
		if got != want {
			t.Errorf("%d columns:\n%s, not\n%s", width, got, want)
		}
		for line := range strings.Lines(got) {
			if n := utf8.RuneCountInString(strings.TrimSpace(line)); n > int(width) && width > 6 {
				t.Errorf("%d columns: a line has %d", width, n)
			}
		}
		if got := onTerminal(t, width, "--full", "table", a, b); !strings.Contains(got, a) || !strings.Contains(got, b) {
			t.Errorf("%d columns, in full:\n%s", width, got)
		}
		if got := onTerminal(t, width, "-z", "table", a, b); !strings.Contains(got, a+"\t1024\t"+b) {
			t.Errorf("%d columns, with -z:\n%s", width, got)
		}
	}
	// Only text reaches the terminal, whatever is in a cell.
	if got := onTerminal(t, 80, "table", "\x1b[31m", "x\ty\nz"); strings.ContainsAny(got, "\x1b\t") || strings.Count(got, "\n") != 3 {
		t.Errorf("%q", got)
	}
}

// onTerminal runs the command on a terminal with this many columns, and returns its output.
func onTerminal(t *testing.T, columns uint16, args ...string) string {
	t.Helper()
	pty, slave, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	tty, err := os.OpenFile(slave, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns}); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), commandEnv+"=1")
	c.Stdin, c.Stdout, c.Stderr = tty, tty, os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	b, _ := io.ReadAll(pty) // reading ends with EIO when nobody has the terminal open
	if err := c.Wait(); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestSignalInterruptsStdin(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		errs, waiting, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		c := exec.Command(os.Args[0], "wait")
		c.Env = append(os.Environ(), commandEnv+"=1")
		c.Stdin, c.Stderr = r, waiting
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		waiting.Close()
		if _, err := errs.Read(make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
		_ = c.Process.Signal(sig)
		_ = c.Wait()
		w.Close()
		errs.Close()
		if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != sig {
			t.Errorf("sent %v: %v", sig, c.ProcessState)
		}
	}
}

// A signal ends the process even if nobody reads its standard output, however it writes.
func TestSignalInterruptsStdout(t *testing.T) {
	for _, how := range []string{"write", "copy"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		c := exec.CommandContext(ctx, os.Args[0], how)
		c.Env = append(os.Environ(), commandEnv+"=1")
		c.Stdout = w
		errs, err := c.StderrPipe()
		if err == nil {
			err = c.Start()
		}
		if err == nil {
			_, err = errs.Read(make([]byte, 16))
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Process.Signal(syscall.SIGTERM)
		_ = c.Wait()
		cancel()
		r.Close()
		w.Close()
		if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGTERM {
			t.Errorf("%s: %v", how, c.ProcessState)
		}
	}
}

// A signal that the parent has ignored, as nohup does, stays ignored.
func TestIgnoredSignalStaysIgnored(t *testing.T) {
	c := exec.Command("sh", "-c", `trap '' HUP; exec "$0" wait`, os.Args[0])
	c.Env = append(os.Environ(), commandEnv+"=1")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	errs, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := errs.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	_ = c.Process.Signal(syscall.SIGHUP)
	in.Write([]byte("x"))
	if err := c.Wait(); err != nil {
		t.Errorf("after HUP: %v", err)
	}
}

func TestCells(t *testing.T) {
	for _, c := range []struct {
		cell               any
		inPipe, onTerminal string
	}{
		{Size(0), "0", "0 B"},
		{Size(1536), "1536", "1.5 KiB"},
		{Size(-1), "-1", "-"},
		{Limit(0), "0", "-"},
		{Limit(64 << 20), "67108864", "64 MiB"},
		{11371652 * time.Nanosecond, "11371652", "11.4ms"},
		{2958300804 * time.Nanosecond, "2958300804", "2.96s"},
		{time.Time{}, "", "-"},
		{"a\tb\x1b", "a\\tb\x1b", "a?b?"},
		{"a\nb", `a\nb`, "a?b"},
		{`a\nb`, `a\\nb`, `a\nb`},
	} {
		if got := raw(c.cell); got != c.inPipe {
			t.Errorf("%#v in a pipe: %q, want %q", c.cell, got, c.inPipe)
		}
		if got := human(c.cell); got != c.onTerminal {
			t.Errorf("%#v on a terminal: %q, want %q", c.cell, got, c.onTerminal)
		}
	}
}

func TestNotStarted(t *testing.T) {
	open := func(err error) error { return &fs.PathError{Op: "open", Path: "/dev/null", Err: err} }
	for _, c := range []struct {
		err    error
		status int
	}{
		{&exec.Error{Name: "none", Err: exec.ErrNotFound}, 127},
		{&fs.PathError{Op: "fork/exec", Path: "/none", Err: syscall.ENOENT}, 127},
		{&fs.PathError{Op: "fork/exec", Path: "/etc/passwd", Err: syscall.EACCES}, 126},
		{fmt.Errorf("x: %w", syscall.ENOEXEC), 126},
		{open(syscall.EMFILE), 1}, {open(syscall.ENFILE), 1}, {open(syscall.ENOMEM), 1},
		{&fs.PathError{Op: "fork/exec", Path: "/bin/true", Err: syscall.EAGAIN}, 1},
	} {
		if got := Status(NotStarted(c.err)); got != c.status {
			t.Errorf("%v: status %d, want %d", c.err, got, c.status)
		}
	}
}

// A flag of docker's that means the same is taken, unless the command has its own flag of that name.
func TestForeignFlags(t *testing.T) {
	t.Parallel()
	command := func(own ...string) (c *cobra.Command, values map[string]*string) {
		c, values = &cobra.Command{Use: "x"}, map[string]*string{}
		for _, name := range own {
			values[name] = c.Flags().String(name, "", "")
		}
		c.Flags().SetNormalizeFunc(translate)
		return c, values
	}
	for _, test := range []struct {
		own  []string
		args []string
		set  string // the flag that has the value x then; "" for none
		err  string
	}{
		{[]string{"net"}, []string{"--network", "x"}, "net", ""},
		{[]string{"net", "network"}, []string{"--network=x"}, "network", ""},
		{[]string{"id", "cwd"}, []string{"--name=x"}, "id", ""},
		{[]string{"cwd"}, []string{"--name=x"}, "", ""},
		{[]string{"cwd"}, []string{"--wrokdir=x"}, "", ": --workdir?"},
		{[]string{"detach"}, []string{"--restart=x"}, "", ": a supervisor such as systemd restarts containers"},
		{[]string{"net"}, []string{"--restart=x"}, "", ""},
		{[]string{"memory-swap"}, []string{"--memory=x"}, "", ""},
		{[]string{"id"}, []string{"--x=x"}, "", ""},
		{[]string{"id"}, []string{"--" + strings.Repeat("i", 1<<20)}, "", ""},
	} {
		c, values := command(test.own...)
		err := c.Flags().Parse(test.args)
		if (err == nil) != (test.set != "") || err != nil && instead(c, err) != test.err {
			t.Errorf("%q with %q: %v %s", test.own, test.args[0][:min(len(test.args[0]), 20)], err, instead(c, err))
		}
		for name, value := range values {
			if (*value == "x") != (name == test.set) {
				t.Errorf("%q with %q: --%s is %q", test.own, test.args, name, *value)
			}
		}
	}
}
