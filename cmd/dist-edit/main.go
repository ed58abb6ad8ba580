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
	o := options{root: cli.Root(f), namespace: cli.Namespace(f)}
	f.BoolVar(&o.config, "config", false, "edit the config of the image, and make a new manifest and new indexes for it")
	f.BoolVar(&o.manifest, "manifest", false, "edit the manifest of the image, and make new indexes for it")
	f.StringVar(&o.platform, "platform", "", "with --config or --manifest: of the image for `PLATFORM` (default: this machine's)")
	f.BoolVar(&o.replace, "replace", false, "let NEW point at the outcome also if it exists; without NEW, NAME")
	f.BoolVar(&o.validate, "validate", false, "store only a manifest, an index or an image config")
	c.MarkFlagsMutuallyExclusive("config", "manifest")
	out := cli.NewRecords(c, "DIGEST", "SIZE")
	c.RunE = func(c *cobra.Command, args []string) error {
		if f.Changed("platform") && !o.config && !o.manifest {
			return cli.Usagef("--platform is for --config and --manifest")
		}
		var command []string
		if n := c.ArgsLenAtDash(); n >= 0 {
			args, command = args[:n], args[n:]
		}
		r, old, err := o.run(c.Context(), args, command)
		if errors.Is(err, errInterrupted) {
			cli.DieBy(unix.SIGINT) // as the editor died
		}
		if err != nil {
			return err
		}
		if r.Digest == old && !out.Quiet() {
			fmt.Fprintf(c.ErrOrStderr(), "%s: %s: unchanged\n", c.Name(), args[0])
		}
		if err := out.Write(r, r.Digest, cli.Size(r.Size)); err != nil {
			return err
		}
		return out.Close()
	}
	return c
}

type options struct {
	root, namespace                     *string
	config, manifest, replace, validate bool
	platform                            string
}

// run edits args[0], in the user's editor unless there is a command, and gives the result the name args[1] if that is
// there. It returns the record of the result, and the digest that args[0] has had.
func (o *options) run(ctx context.Context, args, command []string) (r record, old digest.Digest, err error) {
	s, err := content.Open(*o.root)
	if err != nil {
		return r, "", err
	}
	names, err := image.OpenNames(s, *o.namespace)
	if err != nil {
		return r, "", err
	}
	img, err := (&image.Finder{Names: names}).Find(ctx, args[0])
	if err != nil {
		return r, "", err
	}
	i := imageEdit{store: s, names: names, replace: o.replace, name: img.Name, old: img.Target, labels: img.Labels}
	if len(args) > 1 {
		i.newName = refname.Normalize(args[1])
		// Before a person edits it, not only once it is made.
		if _, err := names.Get(i.newName); err == nil && !o.replace {
			return r, "", errclass.Errorf(errdefs.ErrAlreadyExists, "image %s: already exists; --replace lets it point at the outcome", i.newName)
		}
	} else if o.replace && i.name == "" {
		return r, "", cli.Usagef("--replace is for NEW, or a NAME")
	}
	e := edit{store: s, editor: editor(), command: command}
	part := i.old.Digest
	if i.name != "" || i.newName != "" || o.config || o.manifest {
		w := image.Walker{Store: s}
		if w.Platform, err = image.ParsePlatform(o.platform); err != nil {
			return r, "", err
		}
		find := w.TargetPart
		switch {
		case o.config:
			find = w.ConfigPart
		case o.manifest:
			find = w.ManifestPart
		}
		if i.part, err = find(ctx, i.old); err != nil {
			return r, "", err
		}
		part, e.put = i.part.Digest, i.put
	} else {
		check := image.Validate
		if !o.validate {
			check = nil
		}
		e.put = func(ctx context.Context, f *os.File) (record, error) { return storeBlob(ctx, s, f, part, check) }
	}
	if r, err = e.run(ctx, part); err != nil {
		return r, "", fmt.Errorf("edit %s: %w", args[0], err)
	}
	return r, i.old.Digest, nil
}
