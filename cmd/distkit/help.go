package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/sibling"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

type group struct {
	title    string
	commands []string // full names
}

// groups has every command in one group. Without -a, help shows the first group.
var groups = []group{
	{"Images, whole", []string{"dist-pull", "dist-push", "dist-copy", "dist-unpack", "dist-run", "dist-commit", "dist-mutate", "dist-import", "dist-export", "dist-serve", "dist-static"}},
	{"Registries and other remotes", []string{
		"dist-resolve", "dist-fetch", "dist-put", "dist-copy-graph", "dist-tags", "dist-referrers", "dist-untag",
		"dist-login", "dist-logout", "dist-token", "dist-hosts", "dist-remote-http", "dist-remote-rclone", "dist-remote-ssh", "dist-check-remote",
	}},
	{"The store", []string{
		"dist-ingest", "dist-active", "dist-abort", "dist-list", "dist-path", "dist-cat", "dist-label", "dist-edit", "dist-delete",
		"dist-verify", "dist-gc", "dist-hold", "dist-events", "dist-image", "dist-namespace",
	}},
	{"Layers and root filesystems", []string{
		"dist-apply", "dist-diff", "dist-chain", "dist-erofs", "dist-disk", "snap", "snap-driver-cp", "snap-check-driver",
	}},
	{"Looking inside images", []string{"dist-index", "dist-ls", "dist-file", "dist-du"}},
	{"Containers", []string{"run", "run-spec", "run-cdi", "run-net", "task", "dist-userns"}},
	{"This program", []string{"dist-doctor", "distkit"}},
}

// short returns a command's name after distkit: without dist-, except for run, since distkit run is dist-run.
func short(name string) string {
	if name == "run" {
		return "run-bundle"
	}
	return strings.TrimPrefix(name, "dist-")
}

// help lists commands: those of the first group, or all with -a. With an argument it shows that command's page.
func help(c *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		fmt.Fprintln(c.OutOrStdout(), "distkit COMMAND [ARG…] runs a command by its short name. distkit help COMMAND shows its page, help -a lists all; man 7 distkit explains the terms.")
		list(c, groups[:1])
	case len(args) > 1:
		return cli.Usagef("one COMMAND is wanted, got %d; usage: distkit help [-a | COMMAND]", len(args))
	case args[0] == "-a" || args[0] == "--all":
		list(c, groups)
	default:
		return page(args[0])
	}
	return nil
}

// list prints each command with its purpose, the first line of its own help.
func list(c *cobra.Command, groups []group) {
	for _, g := range groups {
		abouts := make([]string, len(g.commands))
		var all sync.WaitGroup
		for i, name := range g.commands {
			all.Go(func() {
				// Commands that are not installed, or print no help, are not listed.
				if path := locate(name); path != "" {
					out, _ := exec.CommandContext(c.Context(), path, "--help").Output()
					abouts[i], _, _ = strings.Cut(string(out), "\n")
				}
			})
		}
		all.Wait()
		fmt.Fprintf(c.OutOrStdout(), "\n%s\n", g.title)
		for i, name := range g.commands {
			if about := abouts[i]; about != "" {
				fmt.Fprintf(c.OutOrStdout(), "  %-17s %s\n", short(name), about)
			}
		}
	}
}

// page shows a command's man page, or its help if man is not installed.
func page(name string) error {
	path := find(name)
	if path == "" {
		return cli.Usagef("%q is no command: distkit help -a lists them", name)
	}
	man, err := exec.LookPath("man")
	if err != nil {
		return become(path, []string{"--help"})
	}
	file := filepath.Base(path) + ".1"
	for _, dir := range sibling.Dirs() {
		for _, pages := range []string{"../share/man/man1", "../../share/man/man1", "../man"} {
			if at := filepath.Join(dir, pages, file); unix.Access(at, unix.R_OK) == nil {
				return unix.Exec(man, []string{man, at}, os.Environ())
			}
		}
	}
	return unix.Exec(man, []string{man, filepath.Base(path)}, os.Environ())
}
