// Package cli is what all commands of distkit share: how a command starts, how its error becomes one line and an exit
// status, how it dies by a signal, and how it prints records.
//
// A command's main passes a cobra command to [Main], which does not return. It registers shared flags with [Root],
// [Namespace] and [NewRecords], handles lists of objects with [Each] or [Batch], and returns errors with a class of
// errdefs, or [Usagef]. Package cli knows nothing of stores, registries or containers, and imports no domain package.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"distkit/cmd/internal/progress"
	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// ForwardsSignals, set to any value in the Annotations of a command or verb, leaves INT, TERM and HUP to the command,
// which passes them on to what it runs. For every other command, they cancel the context, and then kill the process.
const ForwardsSignals = "distkit/forwards-signals"

// RunsCommand, set in the Annotations of a command or verb, says that it exits with the status of what it runs. Its own
// failures, including wrong usage, have the status 125, like docker's.
const RunsCommand = "distkit/runs-command"

// MayBeEmpty, set in the Annotations of a flag, allows an empty value. All other flags and operands refuse an empty
// string: it is usually an unset variable.
const MayBeEmpty = "distkit/may-be-empty"

// ownFailure is the status of a RunsCommand's own failure.
const ownFailure = 125

// version is set by the linker. If it is empty, the module's version is used.
var version string

// Main runs the command and exits with the status for the class of its error. Standard output is buffered: write to
// cmd.OutOrStdout. If flushing it fails, the command fails.
func Main(c *cobra.Command) {
	os.Exit(run(c))
}

func run(c *cobra.Command) int {
	var started bool
	prepare(c, &started)
	stdout := newOutput()
	c.SetOut(stdout)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if _, tty := IsTerminal(os.Stderr); tty {
		ctx = disk.WithNotice(ctx, func(text string) { Report(c, errors.New(text)) })
	}
	var got func() os.Signal
	verb := c
	if v, _, err := c.Find(os.Args[1:]); err == nil {
		verb = v
	}
	if _, ok := verb.Annotations[ForwardsSignals]; ok {
		got = func() os.Signal { return nil }
	} else {
		got = cancelOnSignal(cancel, func() {
			Report(c, fmt.Errorf("still at work %d seconds after the signal: ended as it was", int(patience.Seconds())))
		})
	}

	ran, err := c.ExecuteContextC(ctx)
	if err != nil && !started && Status(err) == 1 {
		err = Usagef("%w", err) // from cobra's own check of flags
	}
	if ferr := stdout.Flush(); ferr != nil && err == nil {
		err = fmt.Errorf("write standard output: %w", disk.Cause(ferr))
	}
	if sig := got(); sig != nil && err != nil {
		if !errors.Is(err, context.Canceled) {
			Report(c, err)
		}
		DieBy(sig)
	}
	if err == nil {
		return 0
	}
	var exit exitStatus
	if errors.As(err, &exit) {
		if untold := unreported(err); untold != nil {
			Report(c, untold)
		}
		return exit.status
	}
	Report(c, err)
	if _, ok := ran.Annotations[RunsCommand]; ok {
		return ownFailure
	}
	return Status(err)
}

// prepare sets what all commands and their verbs have in common.
func prepare(c *cobra.Command, started *bool) {
	c.SilenceErrors, c.SilenceUsage = true, true
	c.DisableSuggestions = true
	c.CompletionOptions.DisableDefaultCmd = true
	c.Version = Version()
	c.SetErr(os.Stderr)
	c.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return Usagef("%v%s; usage: %s", err, instead(c, err), c.UseLine())
	})
	c.Flags().Bool("version", false, "print the version and exit")
	prepareVerb(c, started)
}

// prepareVerb is prepare for one verb. It sets started when the verb's own code runs.
func prepareVerb(c *cobra.Command, started *bool) {
	c.DisableFlagsInUseLine = true
	c.Flags().SetNormalizeFunc(translate)
	c.Flags().BoolP("help", "h", false, "print this help and exit")
	check := c.Args
	if !c.HasSubCommands() {
		completed(c)
	}
	switch {
	case c.HasSubCommands():
		var verbs []string
		for _, v := range c.Commands() {
			prepareVerb(v, started)
			verbs = append(verbs, v.Name())
		}
		if c.RunE == nil {
			c.RunE = func(*cobra.Command, []string) error { return nil }
			check = func(_ *cobra.Command, args []string) error {
				if len(args) > 0 {
					return fmt.Errorf("unknown verb %q: one of %s", args[0], strings.Join(verbs, ", "))
				}
				return fmt.Errorf("a verb is missing: one of %s", strings.Join(verbs, ", "))
			}
		}
	case check == nil:
		check = cobra.NoArgs
	}
	if run := c.RunE; run != nil {
		c.RunE = func(c *cobra.Command, args []string) error {
			*started = true
			return run(c, args)
		}
	}
	c.Args = func(c *cobra.Command, args []string) error {
		err := check(c, args)
		if err == nil {
			err = checkEmpty(c, args)
		}
		if err != nil {
			return Usagef("%v; usage: %s", err, c.UseLine())
		}
		return nil
	}
}

// checkEmpty returns an error if a flag's value or an operand is the empty string. It does not check the arguments of a
// command that is to be run, nor hints: anything that is not a hint is ignored.
func checkEmpty(c *cobra.Command, args []string) error {
	var err error
	c.Flags().Visit(func(f *pflag.Flag) {
		if _, ok := f.Annotations[MayBeEmpty]; !ok && f.Value.Type() == "string" && f.Value.String() == "" && err == nil {
			err = fmt.Errorf("--%s is empty", f.Name)
		}
	})
	if dash := c.ArgsLenAtDash(); dash >= 0 && strings.Contains(c.Use, "-- ") {
		args = args[:dash]
	}
	words := operands(c.Use)
	for i, a := range args {
		if len(words) == 0 {
			break
		}
		word := words[min(i, len(words)-1)]
		switch {
		case slices.Contains([]string{"ARG", "CMD", "HINT"}, word):
			return err
		case a == "" && err == nil:
			err = fmt.Errorf("%s is empty", word)
		}
	}
	return err
}

// operands returns the names of the operands in a usage line: for "dist-fetch [flags] LOCATOR OBJECT [HINT…]" they are
// LOCATOR, OBJECT and HINT.
func operands(use string) []string {
	var words []string
	for _, w := range strings.Fields(use)[1:] {
		if w == "--" || w == "[--" {
			break
		}
		if w != "[flags]" {
			words = append(words, strings.Trim(w, "[]…|-"))
		}
	}
	return words
}

// Version returns what --version prints.
func Version() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// patience is how long a command may take to end after a signal.
var patience = 10 * time.Second

// writePatience is how long a single write to standard output may take after a signal. Its reader may never read again.
const writePatience = 100 * time.Millisecond

// cancelOnSignal calls cancel at the first INT, TERM or HUP that the parent had not ignored. A second signal kills the
// process. So does the end of patience, after a call of late, or that of writePatience. The returned function tells
// which signal came first.
func cancelOnSignal(cancel context.CancelFunc, late func()) func() os.Signal {
	var sigs []os.Signal
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(s) {
			sigs = append(sigs, s)
		}
	}
	if len(sigs) == 0 {
		return func() os.Signal { return nil }
	}
	ch := make(chan os.Signal, 2)
	first := make(chan os.Signal, 1)
	signal.Notify(ch, sigs...)
	go func() {
		s := <-ch
		first <- s
		cancel()
		end, steps := time.After(patience), int64(0)
		for {
			select {
			case s = <-ch:
			case <-end:
				late()
			case <-time.After(writePatience):
				last := steps
				if steps = Stdout.steps.Load(); steps != last || steps%2 == 0 { // no write is stuck
					continue
				}
			}
			DieBy(s)
		}
	}()
	return func() os.Signal {
		select {
		case s := <-first:
			return s
		default:
			return nil
		}
	}
}

// DieBy kills the process by the signal, so that a shell or xargs sees it die by the signal. It does not return, and
// runs no deferred functions.
func DieBy(s os.Signal) {
	signal.Reset(s)
	_ = unix.Kill(unix.Getpid(), s.(syscall.Signal))
	time.Sleep(time.Second)
	os.Exit(128 + int(s.(syscall.Signal)))
}

type exitStatus struct {
	status int
	err    error
}

func (e exitStatus) Error() string {
	if e.err != nil {
		return e.err.Error()
	}
	return fmt.Sprintf("exit status %d", e.status)
}

func (e exitStatus) Unwrap() error { return e.err }

// Exit returns an error that prints nothing and makes the process exit with status n. It is for commands that pass on
// the status of what they ran, and for errors that were reported already.
func Exit(n int) error { return exitStatus{status: n} }

// ExitWith returns an error that is reported as usual, but has the status n. It is for statuses without a class, such
// as 126 and 127.
func ExitWith(n int, err error) error { return exitStatus{n, err} }

// NotStarted returns the error for a user's command that could not be started. Like a shell, it uses 127 if there is no
// such command, and 126 if it can't be executed. A lack of descriptors, processes or memory is a failure like any
// other.
func NotStarted(err error) error {
	text := fmt.Errorf("run %s", strings.TrimPrefix(err.Error(), "exec: "))
	for _, scarce := range []error{syscall.EMFILE, syscall.ENFILE, syscall.EAGAIN, syscall.ENOMEM} {
		if errors.Is(err, scarce) {
			return fmt.Errorf("start the command: %w", err)
		}
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		return ExitWith(127, text)
	}
	return ExitWith(126, text)
}

// unreported returns what is left to report of an error with a status: the error of [ExitWith], nothing for [Exit], and
// errors joined to either.
func unreported(err error) error {
	switch e := err.(type) {
	case exitStatus:
		return e.err
	case interface{ Unwrap() []error }:
		var all []error
		for _, err := range e.Unwrap() {
			all = append(all, unreported(err))
		}
		return errors.Join(all...)
	case interface{ Unwrap() error }:
		if errors.As(err, new(exitStatus)) {
			return unreported(e.Unwrap())
		}
	}
	return err
}

// Usagef returns an error of wrong usage: status 2, class InvalidArgument.
func Usagef(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// Status returns the exit status for an error's class, the same in all commands.
func Status(err error) int {
	var exit exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.status
	}
	return errclass.Status(err)
}

// Report prints an error after which the command continues.
func Report(c *cobra.Command, err error) {
	progress.Erase(func() { fmt.Fprintf(c.ErrOrStderr(), "%s: %s\n", c.Root().Name(), errclass.OneLine(err.Error())) })
}
