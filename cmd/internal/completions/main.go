// Command completions writes shell completion scripts for the named commands and workflows to DIR. A script contains
// only the command's name: at run time it asks the command itself.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func main() {
	if err := generate(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "completions:", err)
		os.Exit(1)
	}
}

func generate(dir string, names []string) error {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if err := os.MkdirAll(filepath.Join(dir, shell), 0o755); err != nil {
			return err
		}
	}
	for _, name := range names {
		c := &cobra.Command{Use: name}
		for path, write := range map[string]func(string) error{
			"bash/" + name:           func(p string) error { return c.GenBashCompletionFileV2(p, true) },
			"zsh/_" + name:           c.GenZshCompletionFile,
			"fish/" + name + ".fish": func(p string) error { return c.GenFishCompletionFile(p, true) },
		} {
			if err := write(filepath.Join(dir, path)); err != nil {
				return fmt.Errorf("write %s: %w", path, err)
			}
		}
	}
	return nil
}
