package main

import (
	"context"
	"slices"
	"strings"
	"sync"

	"distkit/cmd/internal/cli"
	"distkit/content"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// allTypes is the value of --referrers without one.
const allTypes = "all"

// notType reports whether a value of --referrers can't be a type of artifacts.
func notType(s string) bool {
	blank := func(r rune) bool { return r <= ' ' || r > '~' }
	return s != allTypes && (!strings.Contains(s, "/") || strings.ContainsFunc(s, blank))
}

// setTypes sets the types of the referrers that are copied. It reports whether any are.
func (p places) setTypes(g *copygraph.Copy) (wanted bool, err error) {
	types := strings.Split(strings.Join(p.referrers, ","), ",")
	switch {
	case len(p.referrers) == 0:
		return false, nil
	case slices.Contains(types, allTypes):
		return true, nil
	case slices.ContainsFunc(types, notType):
		return false, cli.Usagef("--referrers wants types of artifacts, such as application/spdx+json, or %s; got %.80q", allTypes, strings.Join(types, ","))
	}
	g.ArtifactTypes = types
	return true, nil
}

// listed has a command list the referrers: those of the one type, if it is one.
func listed(from *copygraph.CommandSource, types []string) copygraph.ListReferrers {
	artifactType := ""
	if len(types) == 1 {
		artifactType = types[0]
	}
	return func(ctx context.Context, subject digest.Digest, f func(v1.Descriptor) error) error {
		return from.Referrers(ctx, subject, artifactType, f)
	}
}

// listedIn has a store list the referrers. Its index is read once.
func listedIn(store *content.Store, namespace string) copygraph.ListReferrers {
	read := sync.OnceValues(func() (map[digest.Digest][]v1.Descriptor, error) {
		all := map[digest.Digest][]v1.Descriptor{}
		names, err := image.OpenNames(store, namespace)
		if err == nil {
			err = names.Referrers(func(d v1.Descriptor, subject digest.Digest) error {
				all[subject] = append(all[subject], d)
				return nil
			})
		}
		return all, err
	})
	return func(_ context.Context, subject digest.Digest, f func(v1.Descriptor) error) error {
		all, err := read()
		if err != nil {
			return err
		}
		for _, d := range all[subject] {
			if err := f(d); err != nil {
				return err
			}
		}
		return nil
	}
}
