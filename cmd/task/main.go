// Command task makes, shows, joins and ends containers.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	runtime.Shim(containers.Open)
	if len(os.Args) > 1 && os.Args[1] == "dist-run" {
		os.Args = os.Args[1:]
		cli.Main(newDistRun())
	}
	cli.Main(newCommand())
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:         "task VERB",
		Short:       "manage containers and their processes",
		Annotations: map[string]string{cli.RunsCommand: ""},
	}
	o := containers.NewFlags(c.PersistentFlags())
	c.AddCommand(
		newCreate(o), newSecret(o), newStart(o), newTrust(o), newRm(o), newLabel(o),
		newLs(o), newInfo(o), newPs(o), newLogs(o),
		newKill(o), newStop(o), newPause(o), newResume(o), newWait(o), newAttach(o), newExec(o),
		newStats(o), newUpdate(o), newCheckpoint(o), newRestore(o), newTar(o), newUntar(o), newVolumes(o),
	)
	return c
}

// passesOn returns the annotations of verbs that exit with the status of a process.
func passesOn() map[string]string { return map[string]string{cli.RunsCommand: ""} }

// passOn exits with the status of a process that has ended.
func passOn(what string, e *runtime.Exit) error {
	switch {
	case e == nil:
		return nil
	case e.Status == nil:
		return fmt.Errorf("%s has ended, %s", what, e.Error)
	case *e.Status != 0:
		return cli.Exit(*e.Status)
	}
	return nil
}

// join gets a container for a verb that works on its processes. For an ordinary user it first moves this process into
// the container's user namespace.
func join(o *containers.Flags, id string) (*runtime.Container, error) {
	t, err := get(o, id)
	if err == nil {
		err = containers.Join(t)
	}
	return t, err
}

// joinProcess is join for a container's own process, or for a further one.
func joinProcess(o *containers.Flags, id, exec string) (*runtime.Process, error) {
	t, err := join(o, id)
	if err != nil {
		return nil, err
	}
	return t.Process(exec)
}

// each is [cli.Each] for verbs that work on containers. An ordinary user's containers may be in different user
// namespaces, so each of several is handled by a separate process.
func each(c *cobra.Command, args []string, f func(id string) error) error {
	if len(args) == 1 && args[0] != "-" || os.Geteuid() == 0 {
		return cli.Each(c, args, f)
	}
	var flags []string
	c.Flags().Visit(func(f *pflag.Flag) {
		if f.Name != "zero" {
			flags = append(flags, fmt.Sprintf("--%s=%s", f.Name, f.Value))
		}
	})
	return cli.Each(c, args, func(id string) error {
		var errs bytes.Buffer
		one := exec.CommandContext(c.Context(), "/proc/self/exe", append(append([]string{c.Name()}, flags...), "--", id)...)
		one.Stdout, one.Stderr = c.OutOrStdout(), &errs
		err := one.Run()
		if text := strings.TrimSpace(errs.String()); err != nil && text != "" {
			return cli.ExitWith(one.ProcessState.ExitCode(), errors.New(strings.TrimPrefix(text, "task: ")))
		}
		if _, passes := c.Annotations[cli.RunsCommand]; passes && one.ProcessState != nil {
			return nil // the status is the container's
		}
		return err
	})
}

func get(o *containers.Flags, id string) (*runtime.Container, error) {
	all, err := o.Open()
	if err != nil {
		return nil, err
	}
	return all.Get(id)
}
