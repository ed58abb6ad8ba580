// Command task makes, shows, joins and ends containers.
package main

import (
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/runtime"

	"github.com/spf13/cobra"
)

func main() {
	runtime.Shim(containers.Open)
	cli.Main(newCommand())
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:         "task VERB",
		Short:       "containers and their processes",
		Annotations: map[string]string{cli.RunsCommand: ""},
	}
	o := containers.NewFlags(c.PersistentFlags())
	c.AddCommand(
		newCreate(o), newStart(o), newRm(o), newLabel(o),
		newLs(o), newInfo(o), newPs(o), newLogs(o),
		newKill(o), newPause(o), newResume(o), newWait(o), newAttach(o), newExec(o),
		newStats(o), newUpdate(o), newCheckpoint(o), newRestore(o),
	)
	return c
}

// passesOn are the annotations of verbs that exit with the status of a process.
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

func get(o *containers.Flags, id string) (*runtime.Container, error) {
	all, err := o.Open()
	if err != nil {
		return nil, err
	}
	return all.Get(id)
}
