package main

import (
	"context"

	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// unpacked tells whether a driver, or the store's own where none is named, has the chain.
func (f *flags) unpacked(ctx context.Context, driver string, chain digest.Digest) (bool, error) {
	s, err := drivers.Open(ctx, *f.root, driver, snapshot.Options{Namespace: *f.namespace})
	if err != nil {
		return false, err
	}
	i, err := s.Stat(ctx, string(chain))
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil && i.Kind == snapshot.Committed, err
}
