// Distkit runs the other commands by their short names, as git does.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/sibling"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() {
	// a command completes its own arguments
	if len(os.Args) > 3 && strings.HasPrefix(os.Args[1], "__complete") {
		if path := find(os.Args[2]); path != "" {
			_ = become(path, append([]string{os.Args[1]}, os.Args[3:]...))
		}
	}
	cli.Main(newCommand())
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "distkit [flags] COMMAND [ARG…]",
		Short: "run a command by its short name",
	}
	c.Flags().SetInterspersed(false)
	dirs := c.Flags().Bool("exec-path", false, "print the directories of the commands, as PATH has them, and exit")
	c.Args = func(_ *cobra.Command, args []string) error {
		if len(args) == 0 && !*dirs {
			return fmt.Errorf("a command is missing: distkit help lists them")
		}
		return nil
	}
	c.ValidArgsFunction = func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		var names []string
		for _, g := range groups {
			for _, name := range g.commands {
				if strings.HasPrefix(short(name), word) {
					names = append(names, short(name))
				}
			}
		}
		return append(names, "help"), cobra.ShellCompDirectiveNoFileComp
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		switch {
		case *dirs:
			fmt.Fprintln(c.OutOrStdout(), strings.Join(sibling.Dirs(), ":"))
			return nil
		case args[0] == "help":
			return help(c, args[1:])
		}
		path := find(args[0])
		if path == "" {
			return cli.Usagef("%q is no command: distkit help -a lists them", args[0])
		}
		return fmt.Errorf("run %s: %w", path, become(path, args[1:]))
	}
	return c
}

// become replaces this process by a command. The command finds our other commands first.
func become(path string, args []string) error {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PATH=") })
	env = append(env, "PATH="+strings.Join(sibling.Dirs(), ":")+":"+os.Getenv("PATH"))
	return unix.Exec(path, append([]string{path}, args...), env)
}

// find returns the path of a command by full or short name, or of a program dist-NAME on PATH, or "".
func find(name string) string {
	full := "dist-" + strings.TrimPrefix(name, "dist-")
	for _, g := range groups {
		for _, c := range g.commands {
			if short(c) == name {
				full = c
			}
		}
	}
	return locate(full)
}

// locate returns the path of a command by its full name, or "". Our own directories come before PATH.
func locate(full string) string {
	if strings.ContainsRune(full, '/') {
		return ""
	}
	for _, dir := range append(sibling.Dirs(), filepath.SplitList(os.Getenv("PATH"))...) {
		path := filepath.Join(dir, full)
		if info, err := os.Stat(path); filepath.IsAbs(path) && err == nil && info.Mode().IsRegular() && unix.Access(path, unix.X_OK) == nil {
			return path
		}
	}
	return ""
}
