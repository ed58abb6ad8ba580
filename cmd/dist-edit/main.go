// Dist-edit edits a blob, in an editor or by a command, and stores the outcome as a new blob; or a part of an image, as a new
// image.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/errclass"
	"distkit/image"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-edit [flags] DIGEST|NAME [NEW] [-- COMMAND [ARG…]]",
		Short: "edit a blob, or a part of an image, into a new one",
		Args: func(c *cobra.Command, args []string) error {
			n := c.ArgsLenAtDash()
			if n == len(args) {
				return errors.New("after -- a COMMAND is missing")
			}
			if n < 0 {
				n = len(args)
			}
			return cobra.RangeArgs(1, 2)(c, args[:n])
		},
	}
	f := c.Flags()
	root, namespace := cli.Root(f), cli.Namespace(f)
	config := f.Bool("config", false, "edit the config of the image, and make a new manifest and new indexes for it")
	manifest := f.Bool("manifest", false, "edit the manifest of the image, and make new indexes for it")
	platform := f.String("platform", "", "with --config or --manifest: of the image for `PLATFORM` (default: this machine's)")
	replace := f.Bool("replace", false, "let NEW point at the outcome also if it exists; without NEW, NAME")
	validate := f.Bool("validate", false, "store only a manifest, an index or an image config")
	c.MarkFlagsMutuallyExclusive("config", "manifest")
	out := cli.NewRecords(c, "DIGEST", "SIZE")
	c.RunE = func(c *cobra.Command, args []string) error {
		if f.Changed("platform") && !*config && !*manifest {
			return cli.Usagef("--platform is for --config and --manifest")
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		names, err := image.OpenNames(s, *namespace)
		if err != nil {
			return err
		}
		e := edit{store: s, editor: editor()}
		if n := c.ArgsLenAtDash(); n >= 0 {
			args, e.command = args[:n], args[n:]
		}
		img, err := (&image.Finder{Names: names}).Find(c.Context(), args[0])
		if err != nil {
			return err
		}
		named := img.Name != ""
		i := imageEdit{store: s, names: names, replace: *replace, name: img.Name, old: img.Target, labels: img.Labels}
		if len(args) > 1 {
			i.newName = refname.Normalize(args[1])
			// Before a person edits it, not only once it is made.
			if _, err := names.Get(i.newName); err == nil && !*replace {
				return errclass.Errorf(errdefs.ErrAlreadyExists, "image %s: already exists; --replace lets it point at the outcome", i.newName)
			}
		} else if *replace && !named {
			return cli.Usagef("--replace is for NEW, or a NAME")
		}
		old := i.old.Digest
		if named || i.newName != "" || *config || *manifest {
			w := image.Walker{Store: s}
			if w.Platform, err = image.ParsePlatform(*platform); err != nil {
				return err
			}
			part := w.TargetPart
			switch {
			case *config:
				part = w.ConfigPart
			case *manifest:
				part = w.ManifestPart
			}
			if i.part, err = part(c.Context(), i.old); err != nil {
				return err
			}
			old, e.put = i.part.Digest, i.put
		} else {
			check := image.Validate
			if !*validate {
				check = nil
			}
			e.put = func(ctx context.Context, f *os.File) (record, error) { return storeBlob(ctx, s, f, old, check) }
		}
		r, err := e.run(c.Context(), old)
		if errors.Is(err, errInterrupted) {
			cli.DieBy(unix.SIGINT) // as the editor died
		}
		if err != nil {
			return fmt.Errorf("edit %s: %w", args[0], err)
		}
		if r.Digest == i.old.Digest && !out.Quiet() {
			fmt.Fprintf(c.ErrOrStderr(), "%s: %s: unchanged\n", c.Name(), args[0])
		}
		if err := out.Write(r, r.Digest, cli.Size(r.Size)); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}
