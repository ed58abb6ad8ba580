// Dist-apply writes a layer into a directory.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"runtime/debug"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"distkit/archive"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/erofs"
)

var whiteouts = map[string]archive.Whiteouts{
	"remove":       archive.Remove,
	"overlay":      archive.Overlay,
	"overlay-user": archive.OverlayUser,
}

func main() {
	debug.SetGCPercent(25) // many run at the same time, and most of their memory is buffers
	cli.Main(newCmd())
}

func newCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-apply [flags] DIR",
		Short: "unpack a layer into a directory",
		Args:  cobra.ExactArgs(1),
	}
	expect := c.Flags().String("expect-diff-id", "", "fail unless the layer's diff ID is `DIGEST`")
	strict := c.Flags().Bool("strict", false, "fail where an owner, device or attribute can't be set")
	form := c.Flags().String("whiteouts", "remove", "what becomes of whiteouts: `FORM` is remove, overlay, overlay-user or archive")
	unresolved := c.Flags().String("unresolved", "", "record in `FILE` what only the layers below can tell")
	maxBytes := c.Flags().Uint64("max-bytes", 0, "fail where the uncompressed layer, or its sparse files, has more than `N` bytes")
	maxEntries := c.Flags().Uint32("max-entries", 0, "fail where the layer makes more than `N` files and directories")
	maxDepth := c.Flags().Uint16("max-depth", 0, "fail where a path of the layer has more than `N` names")
	uids := c.Flags().StringArray("uid-map", nil, "give files of the users from LAYER on to those from FILE on: `LAYER:FILE:SIZE`")
	gids := c.Flags().StringArray("gid-map", nil, "the same for groups: `LAYER:FILE:SIZE`")
	only := c.Flags().StringArray("only", nil, "write only `PATH` and what is below it")
	exclude := c.Flags().StringArray("exclude", nil, "leave out `PATH` and what is below it")
	// Scripts pass on what snap stack gives them, which is "" if the driver does not need the list.
	c.Flags().Lookup("unresolved").Annotations = map[string][]string{cli.MayBeEmpty: nil}
	c.RunE = func(c *cobra.Command, args []string) error {
		if *form == "archive" {
			if *strict || *unresolved != "" || *maxDepth > 0 || len(*uids)+len(*gids)+len(*only)+len(*exclude) > 0 {
				return cli.Usagef("--whiteouts archive: the layer is not applied: only --expect-diff-id, --max-bytes and --max-entries have a meaning")
			}
			opts := erofs.StoreOptions{ExpectDiffID: digest.Digest(*expect), MaxBytes: int64(min(*maxBytes, math.MaxInt64)), MaxEntries: int64(*maxEntries), Turn: turn()}
			if opts.ExpectDiffID != "" && opts.ExpectDiffID.Validate() != nil {
				return cli.Usagef("--expect-diff-id: %q is not a digest", *expect)
			}
			return store(c, args[0], opts)
		}
		w, ok := whiteouts[*form]
		if !ok {
			return cli.Usagef("--whiteouts: %q is not one of remove, overlay, overlay-user, archive", *form)
		}
		opts := archive.Options{ExpectDiffID: digest.Digest(*expect), Strict: *strict, Whiteouts: w, Turn: turn(), Only: *only, Exclude: *exclude,
			MaxBytes: int64(min(*maxBytes, math.MaxInt64)), MaxEntries: int64(*maxEntries), MaxDepth: int(*maxDepth)}
		var err error
		if opts.UIDs, err = archive.ParseIDMap(*uids); err != nil {
			return cli.Usagef("--uid-map: %w", err)
		}
		if opts.GIDs, err = archive.ParseIDMap(*gids); err != nil {
			return cli.Usagef("--gid-map: %w", err)
		}
		if opts.ExpectDiffID != "" && opts.ExpectDiffID.Validate() != nil {
			return cli.Usagef("--expect-diff-id: %q is not a digest", *expect)
		}
		if *unresolved == "" {
			return apply(c, args[0], opts)
		}
		if w == archive.Remove {
			return cli.Usagef("--unresolved: wants --whiteouts overlay or overlay-user")
		}
		if len(*only)+len(*exclude) > 0 {
			return cli.Usagef("--unresolved: is for a whole layer, without --only and --exclude")
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

// into makes a directory if it is missing, and calls do with the layer on standard input.
func into(c *cobra.Command, dir string, do func(layer io.Reader) error) (err error) {
	switch made := os.Mkdir(dir, 0o755); {
	case errors.Is(made, fs.ErrNotExist):
		return errdefs.ErrNotFound.WithMessage(made.Error())
	case errors.Is(made, fs.ErrExist):
	case made != nil:
		return made
	default:
		defer func() {
			if err != nil {
				_ = os.Remove(dir) // fails unless it is still empty
			}
		}()
		if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is
			return err
		}
	}
	in, err := cli.LayerStdin(c.Context())
	if err != nil {
		return err
	}
	defer in.Close()
	step := progress.Begin("")
	defer step.End()
	if info, err := os.Stdin.Stat(); err == nil && info.Mode().IsRegular() {
		step.Total(info.Size(), 0)
	}
	return do(step.Reader(in))
}

func apply(c *cobra.Command, dir string, opts archive.Options) error {
	return into(c, dir, func(in io.Reader) error {
		result, err := archive.Apply(c.Context(), dir, in, opts)
		if err != nil {
			return err
		}
		if len(result.Unset) > 0 {
			cli.Report(c, fmt.Errorf("could not set %s", cli.Counts(result.Unset)))
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(result)
	})
}

// store stores a layer as an archive.
func store(c *cobra.Command, dir string, opts erofs.StoreOptions) error {
	return into(c, dir, func(in io.Reader) error {
		stored, err := erofs.Store(c.Context(), dir, in, opts)
		if err != nil {
			return err
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(stored)
	})
}
