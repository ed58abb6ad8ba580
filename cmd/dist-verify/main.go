// Dist-verify hashes blobs again and reports what is corrupt, missing or stray.
package main

import (
	"context"
	"runtime"

	"distkit/cmd/internal/cli"
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
		Short: "hash blobs again and report what is corrupt, missing or stray",
		Args:  cobra.ArbitraryArgs,
	}
	f := c.Flags()
	root := cli.Root(f)
	remove := f.Bool("delete", false, "delete what is corrupt, and print the digests of that alone")
	jobs := f.IntP("jobs", "j", runtime.GOMAXPROCS(0), "hash `N` blobs at a time")
	out := cli.NewRecords(c, "OBJECT", "PROBLEM")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *jobs < 1 {
			return cli.Usagef("--jobs %d is less than 1", *jobs)
		}
		s, err := content.Open(*root)
		if err != nil {
			return err
		}
		found := make(chan record)
		failed := make(chan error, 1)
		go func() {
			defer close(found)
			failed <- verify(c, s, args, *jobs, *remove, found)
		}()
		bad := false
		for r := range found {
			if !*remove || r.Problem != "corrupt" {
				bad = true
			}
			if *remove && r.Problem != "corrupt" {
				continue
			}
			if werr := out.Write(r, r.Object, r.Problem); err == nil {
				err = werr
			}
		}
		if verr := <-failed; verr != nil {
			return verr
		}
		if err == nil {
			err = out.Close()
		}
		if err == nil && bad {
			return cli.Exit(problemsFound)
		}
		return err
	}
	return c
}

// verify looks at the blobs named, or at all of them and at what is no blob.
func verify(c *cobra.Command, s *content.Store, args []string, jobs int, remove bool, found chan<- record) error {
	group, ctx := errgroup.WithContext(c.Context())
	group.SetLimit(jobs)
	check := func(dgst digest.Digest) error {
		group.Go(func() error { return one(ctx, s, dgst, remove, len(args) > 0, found) })
		return ctx.Err()
	}
	var err error
	if len(args) > 0 {
		err = cli.Each(c, args, func(object string) error {
			if err := content.Validate(digest.Digest(object)); err != nil {
				return err
			}
			return check(digest.Digest(object))
		})
	} else if err = s.Digests(ctx, check); err == nil {
		err = s.Strays(ctx, func(path string) error {
			found <- record{path, "stray"}
			return nil
		})
	}
	if gerr := group.Wait(); gerr != nil {
		return gerr // what cancelled the rest
	}
	return err
}

func one(ctx context.Context, s *content.Store, dgst digest.Digest, remove, named bool, found chan<- record) error {
	err := s.Verify(ctx, dgst)
	if errdefs.IsDataLoss(err) && remove {
		err = s.DeleteCorrupt(ctx, dgst)
		if err == nil {
			found <- record{string(dgst), "corrupt"}
			return nil
		}
		if errdefs.IsFailedPrecondition(err) {
			return nil // replaced meanwhile
		}
	}
	switch {
	case errdefs.IsDataLoss(err):
		found <- record{string(dgst), "corrupt"}
	case errdefs.IsNotFound(err):
		if named {
			found <- record{string(dgst), "missing"}
		}
	default:
		return err
	}
	return nil
}
