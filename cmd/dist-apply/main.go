// Dist-apply writes a layer into a directory.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"distkit/archive"
	"distkit/cmd/internal/cli"
)

var whiteouts = map[string]archive.Whiteouts{
	"remove":       archive.Remove,
	"overlay":      archive.Overlay,
	"overlay-user": archive.OverlayUser,
}

func main() { cli.Main(newCmd()) }

func newCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-apply [flags] DIR",
		Short: "write a layer into a directory",
		Args:  cobra.ExactArgs(1),
	}
	expect := c.Flags().String("expect-diff-id", "", "fail unless the layer's diff ID is `DIGEST`")
	strict := c.Flags().Bool("strict", false, "fail where an owner, device or attribute can't be set")
	form := c.Flags().String("whiteouts", "remove", "what becomes of whiteouts: `FORM` is remove, overlay or overlay-user")
	unresolved := c.Flags().String("unresolved", "", "record in `FILE` what only the layers below can tell")
	// Scripts pass on what snap stack gives them, which is empty where the driver wants none.
	c.Flags().Lookup("unresolved").Annotations = map[string][]string{cli.MayBeEmpty: nil}
	c.RunE = func(c *cobra.Command, args []string) error {
		w, ok := whiteouts[*form]
		if !ok {
			return cli.Usagef("--whiteouts: %q is not one of remove, overlay, overlay-user", *form)
		}
		opts := archive.Options{ExpectDiffID: digest.Digest(*expect), Strict: *strict, Whiteouts: w}
		if opts.ExpectDiffID != "" && opts.ExpectDiffID.Validate() != nil {
			return cli.Usagef("--expect-diff-id: %q is not a digest", *expect)
		}
		if *unresolved == "" {
			return apply(c, args[0], opts)
		}
		if w == archive.Remove {
			return cli.Usagef("--unresolved: wants --whiteouts overlay or overlay-user")
		}
		f, err := os.Create(*unresolved)
		if err != nil {
			return err
		}
		opts.Unresolved = f
		return errors.Join(apply(c, args[0], opts), f.Close())
	}
	return c
}

func apply(c *cobra.Command, dir string, opts archive.Options) error {
	if err := os.Mkdir(dir, 0o755); errors.Is(err, fs.ErrNotExist) {
		return errdefs.ErrNotFound.WithMessage(err.Error())
	} else if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	in, err := stdin(c.Context())
	if err != nil {
		return err
	}
	defer in.Close()
	result, err := archive.Apply(c.Context(), dir, in, opts)
	if err != nil {
		return err
	}
	if len(result.Unset) > 0 {
		var unset []string
		for _, kind := range slices.Sorted(maps.Keys(result.Unset)) {
			unset = append(unset, fmt.Sprintf("%s of %d entries", kind, result.Unset[kind]))
		}
		fmt.Fprintf(c.ErrOrStderr(), "%s: could not set %s\n", c.Name(), strings.Join(unset, ", "))
	}
	return json.NewEncoder(c.OutOrStdout()).Encode(result)
}

// stdin is read as it is where reads never wait, else so that a signal ends them, and a failure
// to apply does too.
func stdin(ctx context.Context) (io.ReadCloser, error) {
	if info, err := os.Stdin.Stat(); err == nil && info.Mode().IsRegular() {
		return os.Stdin, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	in, err := cli.Stdin(ctx)
	return waiting{in, cancel}, err
}

type waiting struct {
	io.ReadCloser
	cancel context.CancelFunc
}

// SetReadDeadline ends a read that waits: the only deadline that Apply sets is now.
func (w waiting) SetReadDeadline(time.Time) error {
	w.cancel()
	return nil
}
