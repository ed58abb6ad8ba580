// Dist-verify hashes blobs again and reports what is corrupt, missing, damaged or stray.
package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

func main() { cli.Main(newCommand()) }

type record struct {
	Object  string `json:"object"`
	Problem string `json:"problem"`
}

// problemsFound is the status of a failed verification.
const problemsFound = 4

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-verify [flags] [DIGEST…]",
		Short: "hash blobs again and report damage",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root := cli.Root(f)
	remove := f.Bool("delete", false, "delete what is corrupt, and print the digests of that alone")
	jobs := f.IntP("jobs", "j", runtime.GOMAXPROCS(0), "hash `N` blobs at a time")
	resume := f.String("resume", "", "go on where a run stopped that was interrupted, by what it noted in `FILE`")
	names := f.Bool("names", false, "tell of every name of every namespace whether its image is whole")
	c.MarkFlagsMutuallyExclusive("names", "delete")
	c.MarkFlagsMutuallyExclusive("names", "resume")
	out := cli.NewRecords(c, "OBJECT", "PROBLEM")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *jobs < 1 {
			return cli.Usagef("--jobs %d is less than 1", *jobs)
		}
		if *names && len(args) > 0 {
			return cli.Usagef("--names is of all names: no DIGEST goes with it")
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		if *names {
			return checkNames(c, s, out)
		}
		step := progress.Begin("blobs")
		defer step.End()
		v := verification{step: step, store: s, jobs: *jobs, remove: *remove, found: make(chan record)}
		if *resume != "" {
			if v.journal, err = openJournal(*resume); err != nil {
				return err
			}
		}
		failed := make(chan error, 1)
		go func() {
			defer close(v.found)
			err := v.run(c, args)
			failed <- errors.Join(err, v.journal.close(err == nil))
		}()
		bad := 0
		var left record // the last problem that --delete does not delete
		for r := range v.found {
			if *remove && r.Problem != "corrupt" {
				bad, left = bad+1, r
				continue
			}
			if !*remove {
				bad++
			}
			if werr := out.Write(r, r.Object, cli.State(r.Problem)); err == nil {
				err = werr
			}
		}
		if verr := <-failed; verr != nil {
			return verr
		}
		step.End()
		if err == nil {
			err = out.Close()
		}
		switch {
		case err != nil || bad == 0:
			return err
		case *remove:
			return cli.ExitWith(problemsFound, fmt.Errorf("%d other problems are left, such as %q: %s", bad, left.Object, left.Problem))
		}
		return cli.Exit(problemsFound)
	}
	return c
}

// verification is one run over blobs.
type verification struct {
	step    *progress.Step
	store   *content.Store
	jobs    int
	remove  bool     // delete corrupt blobs
	journal *journal // nil for none
	found   chan record
}

// run checks the named blobs, or all blobs and all files that are not blobs.
func (v verification) run(c *cobra.Command, args []string) error {
	group, ctx := errgroup.WithContext(c.Context())
	group.SetLimit(v.jobs)
	check := func(dgst digest.Digest) error {
		if !v.journal.has(dgst) {
			group.Go(func() error { return v.one(ctx, dgst, len(args) > 0) })
		}
		return ctx.Err()
	}
	var err error
	if len(args) > 0 {
		err = cli.Each(c, args, func(object string) error {
			dgst, err := v.store.Complete(ctx, object)
			if err != nil {
				return err
			}
			return check(dgst)
		})
	} else if err = v.store.Digests(ctx, check); err == nil {
		err = v.store.Strays(ctx, func(path string) error {
			v.found <- record{path, "stray"}
			return nil
		})
	}
	if gerr := group.Wait(); gerr != nil {
		return gerr // the error that cancelled the rest
	}
	return err
}

func (v verification) one(ctx context.Context, dgst digest.Digest, named bool) error {
	err := v.store.Verify(ctx, dgst)
	if err == nil {
		info, err := v.store.Info(ctx, dgst)
		v.step.Add(info.Size)
		v.step.Count()
		if errdefs.IsDataLoss(err) {
			v.found <- record{path.Join("labels", string(dgst.Algorithm()), dgst.Encoded()), "damaged"}
			return nil
		}
	}
	if errdefs.IsDataLoss(err) && v.remove {
		err = v.store.DeleteCorrupt(ctx, dgst)
		if err == nil {
			v.found <- record{string(dgst), "corrupt"}
			return nil
		}
		if errdefs.IsFailedPrecondition(err) {
			return nil // replaced in the meantime
		}
	}
	switch {
	case err == nil:
		return v.journal.add(dgst)
	case errdefs.IsDataLoss(err):
		v.found <- record{string(dgst), "corrupt"}
	case errdefs.IsNotFound(err):
		if named {
			v.found <- record{string(dgst), "missing"}
		}
	default:
		return err
	}
	return nil
}
