package main

import (
	"context"
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/image"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
)

// somethingMissing is the status if blobs of images are missing, but none is corrupt.
const somethingMissing = 3

// nameRecord is a name and the state of its image.
type nameRecord struct {
	Name      string        `json:"name"`
	Namespace string        `json:"namespace"`
	Digest    digest.Digest `json:"digest"`
	state
}

type state struct {
	State   image.State `json:"state"`
	Missing int         `json:"missing"` // number of blobs
	Problem string      `json:"problem,omitempty"`
}

// checkNames prints the state of every name in every namespace.
func checkNames(c *cobra.Command, s *content.Store, out *cli.Records) error {
	out.Columns("NAME", "NAMESPACE", "DIGEST", "STATE")
	all := image.OpenNamespaces(s)
	namespaces, err := all.List()
	if err != nil {
		return err
	}
	step := progress.Begin("names")
	defer step.End()
	n := checker{walker: image.Walker{Store: s}, known: map[digest.Digest]state{}}
	err = cli.Each(c, namespaces, func(namespace string) error {
		names, err := all.Open(namespace)
		if err != nil {
			return err
		}
		images, err := names.List()
		if err != nil {
			return fmt.Errorf("namespace %s: %w", namespace, err)
		}
		for _, img := range images {
			is, err := n.check(c.Context(), img.Target)
			if err != nil {
				return fmt.Errorf("name %s of namespace %s: %w", img.Name, namespace, err)
			}
			step.Count()
			r := nameRecord{img.Name, namespace, img.Target.Digest, is}
			if err := out.Write(r, r.Name, r.Namespace, r.Digest, cli.State(r.State)); err != nil {
				return err
			}
		}
		return nil
	})
	step.End()
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	switch {
	case err != nil:
		return err
	case n.corrupt > 0:
		return cli.Exit(problemsFound)
	case n.missing > 0:
		return cli.Exit(somethingMissing)
	}
	return nil
}

// checker determines the state of images, once for each.
type checker struct {
	walker           image.Walker
	known            map[digest.Digest]state
	corrupt, missing int // numbers of names
}

func (n *checker) check(ctx context.Context, d v1.Descriptor) (state, error) {
	is, ok := n.known[d.Digest]
	if !ok {
		var problem error
		var err error
		if is.State, is.Missing, problem, err = n.walker.State(ctx, d); err != nil {
			return is, err
		}
		if problem != nil {
			is.Problem = problem.Error()
		}
		n.known[d.Digest] = is
	}
	switch is.State {
	case image.Corrupt:
		n.corrupt++
	case image.Dangling, image.Incomplete:
		n.missing++
	}
	return is, nil
}
