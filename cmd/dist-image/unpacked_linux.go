package main

import (
	"context"

	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// unpacked reports whether a driver has the chain. If driver is "", it asks the store's own.
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
