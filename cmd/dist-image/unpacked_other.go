//go:build !linux

package main

import (
	"context"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// unpacked is unknown on systems without snapshots.
func (f *flags) unpacked(context.Context, string, digest.Digest) (bool, error) {
	return false, errdefs.ErrNotImplemented.WithMessage("--unpacked: there are no snapshots on this system")
}
