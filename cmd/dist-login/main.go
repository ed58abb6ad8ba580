// Dist-login verifies credentials for a registry, and stores them where docker and podman read them.
package main

import (
	"io"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-login [flags] HOST",
		Short: "check credentials for a registry, and store them",
		Args:  cobra.ExactArgs(1),
	}
	options := registry.Flags(c)
	records := cli.NewRecords(c, "HOST", "USER", "PLACE")
	username := c.Flags().StringP("username", "u", "", "the `NAME`; asked for on a terminal unless given")
	fromStdin := c.Flags().Bool("password-stdin", false, "read the password from standard input")
	c.RunE = func(c *cobra.Command, args []string) error {
		name, password, err := ask(c, *username, *fromStdin)
		if err != nil {
			return err
		}
		place, err := remotes.Login(c.Context(), args[0], *options, name, password)
		if err != nil {
			return err
		}
		value := map[string]string{"host": args[0], "user": name, "place": place}
		if err := records.Write(value, args[0], name, place); err != nil {
			return err
		}
		return records.Close()
	}
	return c
}

// maxPassword bounds a password. Tokens used as passwords have kilobytes.
const maxPassword = 64 << 10

func ask(c *cobra.Command, name string, fromStdin bool) (_, password string, err error) {
	_, isTerminal := cli.IsTerminal(os.Stdin)
	switch {
	case fromStdin && name == "":
		return "", "", cli.Usagef("--password-stdin wants --username")
	case !fromStdin && !isTerminal:
		return "", "", cli.Usagef("standard input is no terminal: give --username and --password-stdin")
	case !fromStdin:
		if name == "" {
			if name, err = cli.Prompt(c.Context(), "Username: ", true); err != nil {
				return "", "", err
			}
		}
		password, err = cli.Prompt(c.Context(), "Password: ", false)
		return name, password, err
	}
	in, err := cli.Stdin(c.Context())
	if err != nil {
		return "", "", err
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, maxPassword))
	return name, strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r"), err
}
