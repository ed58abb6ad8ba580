package main

import (
	"strings"

	"distkit/cmd/internal/cli"

	"github.com/spf13/cobra"
)

func newSources() *cobra.Command {
	c := &cobra.Command{
		Use:   "sources [flags] NAME|DIGEST HOST/REPOSITORY",
		Short: "list which blobs of an image another repository of the registry is known to have",
		Args:  cobra.ExactArgs(2),
	}
	f := newFlags(c)
	f.allPlatforms, f.platform = new(bool), new(string)
	*f.allPlatforms = true
	records := cli.NewRecords(c, "DIGEST", "REPOSITORY")
	c.RunE = func(c *cobra.Command, args []string) error {
		host, repository, ok := strings.Cut(args[1], "/")
		if !ok || host == "" {
			return cli.Usagef("%q is no HOST/REPOSITORY", args[1])
		}
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		sources, err := f.names.Sources(c.Context(), w, d, host, repository)
		if err != nil {
			return err
		}
		for _, s := range sources {
			if err := records.Write(s, s.Digest, s.Repository); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}
