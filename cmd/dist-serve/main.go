// Dist-serve answers the OCI distribution protocol from a store or layout.
package main

import (
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/errclass"
	"distkit/image"
	"distkit/image/serve"
	"distkit/refname"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-serve [flags]",
		Short: "serve a store or layout as a registry",
		Args:  cobra.NoArgs,
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	listen := f.String("listen", "127.0.0.1:5000", "listen on `ADDRESS`, host:port or unix:PATH")
	stdio := f.Bool("stdio", false, "answer one connection, which is standard input and output")
	writable := f.Bool("writable", false, "allow to push")
	deletable := f.Bool("delete", false, "allow to delete")
	repository := f.String("repository", "", "the `NAME` of the repository of names that are a tag alone (default: the directory's name)")
	users := f.String("htpasswd", "", "answer users in `FILE` alone, which htpasswd -B has written")
	cert := f.String("tls-cert", "", "speak TLS with the certificates in `FILE`")
	key := f.String("tls-key", "", "the certificate's key is in `FILE`")
	limit := f.Int("max-connections", 1024, "answer `N` connections at the same time at most")
	verbose := f.BoolP("verbose", "v", false, "tell of each request on standard error")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if *limit < 1 {
			return cli.Usagef("--max-connections wants a number from 1 on, got %d", *limit)
		}
		if *repository != "" && !refname.IsRepository(*repository) {
			return cli.Usagef("--repository %q is no name of a repository", *repository)
		}
		store, err := content.Open(*root)
		if err != nil {
			return err
		}
		names, err := image.OpenNames(store, *namespace)
		if err != nil {
			return err
		}
		s := &serve.Server{Store: store, Names: names, Bare: *repository, Writable: *writable, Deletable: *deletable}
		if base := strings.ToLower(filepath.Base(store.Root())); s.Bare == "" && refname.IsRepository(base) {
			s.Bare = base
		}
		if *verbose {
			s.Log = func(r serve.Request) {
				line := fmt.Sprintf("dist-serve: %s %s %.500s %d %d %s", r.From, r.Method, r.Path, r.Status, r.Bytes, r.Took)
				if r.Err != nil {
					line += fmt.Sprintf(": %v", r.Err)
				}
				fmt.Fprintln(os.Stderr, errclass.OneLine(line))
			}
		}
		if *users != "" {
			if s.Users, err = readUsers(*users); err != nil {
				return err
			}
		}
		config, err := secure(*cert, *key)
		if err != nil {
			return err
		}
		if *stdio {
			return onStdio(c.Context(), s, config)
		}
		l, err := open(*listen)
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Fprintln(c.OutOrStdout(), l.Addr())
		if err := cli.Flush(c); err != nil {
			return err
		}
		return s.Serve(c.Context(), l, *limit, config)
	}
	return c
}

func readUsers(name string) (*serve.Users, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	users, err := serve.ReadUsers(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return users, nil
}

// secure returns the TLS configuration, or nil for none.
func secure(cert, key string) (*tls.Config, error) {
	if (cert == "") != (key == "") {
		return nil, cli.Usagef("--tls-cert and --tls-key go together")
	}
	if cert == "" {
		return nil, nil
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}}, nil
}
