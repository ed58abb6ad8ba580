// Dist-hosts makes hosts.toml files of podman's registries.conf.
package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"distkit/cmd/internal/cli"
	"distkit/disk"
	"distkit/errclass"
	"distkit/remotes"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-hosts [flags] [DIR]",
		Short: "convert podman's registries.conf to hosts.toml files",
		Args:  cobra.MaximumNArgs(1),
	}
	records := cli.NewRecords(c, "HOST", "FILE")
	only := c.Flags().String("host", "", "print the hosts.toml of `HOST` alone")
	plain := c.Flags().Bool("plain-http", false, "insecure hosts speak HTTP, not HTTPS")
	replace := c.Flags().Bool("replace", false, "replace files that differ")
	c.RunE = func(c *cobra.Command, args []string) error {
		if (len(args) == 1) == (*only != "") {
			return cli.Usagef("either DIR or --host is wanted; usage: %s", c.UseLine())
		}
		list, helpers, err := read(c)
		if err != nil {
			return err
		}
		prefixes, byPrefix := []string{}, map[string]remotes.RegistryConf{}
		for _, r := range list {
			if *only == "" || r.Prefix == *only {
				prefixes = append(prefixes, r.Prefix)
			}
			byPrefix[r.Prefix] = r
		}
		if *only != "" && len(prefixes) == 0 {
			return errclass.Errorf(errdefs.ErrNotFound, "no registry %s in registries.conf", *only)
		}
		if *only != "" {
			helpers = nil
		}
		left := cli.Each(c, helpers, func(helper string) error {
			return errclass.Errorf(errdefs.ErrNotImplemented, "hosts.toml names no credential helper: let an auth file have {\"credsStore\": %q}", helper)
		})
		err = cli.Each(c, prefixes, func(prefix string) error {
			host, content, err := byPrefix[prefix].HostsTOML(*plain)
			if err != nil {
				return err
			}
			if *only != "" {
				_, err = io.WriteString(c.OutOrStdout(), content)
				return err
			}
			file := filepath.Join(args[0], remotes.HostDirName(host), "hosts.toml")
			if err := write(file, []byte(content), *replace); err != nil {
				return fmt.Errorf("configuration of %s: %w", host, err)
			}
			return records.Write(map[string]string{"host": host, "file": file}, host, file)
		})
		return cmp.Or(err, left, records.Close())
	}
	return c
}

func read(c *cobra.Command) (list []remotes.RegistryConf, helpers []string, err error) {
	in, err := cli.Stdin(c.Context())
	if err != nil {
		return nil, nil, err
	}
	defer in.Close()
	b, err := io.ReadAll(io.LimitReader(in, remotes.MaxManifest+1))
	if err == nil && len(b) > remotes.MaxManifest {
		err = errclass.Errorf(errdefs.ErrInvalidArgument, "registries.conf is larger than %d bytes", remotes.MaxManifest)
	}
	if err != nil {
		return nil, nil, err
	}
	return remotes.ParseRegistries(b)
}

func write(file string, content []byte, replace bool) error {
	was, err := os.ReadFile(file)
	switch {
	case err == nil && bytes.Equal(was, content):
		return nil
	case err == nil && !replace:
		return errclass.Errorf(errdefs.ErrAlreadyExists, "%s is there and differs: --replace replaces it", file)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return disk.Replace(file, content, 0o644, true)
}
