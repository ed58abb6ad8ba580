package main

import (
	"context"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/image"
	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/opencontainers/go-digest"
)

// sweepSnapshots deletes those of all drivers that are not needed.
func sweepSnapshots(root string, before time.Time, dryRun bool, write func(v any, columns ...any) error) func(context.Context, image.Needed) error {
	return func(ctx context.Context, needed image.Needed) error {
		used, err := drivers.Used(root)
		if err != nil {
			return err
		}
		for _, driver := range used {
			if err := sweepDriver(ctx, root, driver, needed, snapshot.Sweep{Before: before, DryRun: dryRun}, write); err != nil {
				return err
			}
		}
		return nil
	}
}

func sweepDriver(ctx context.Context, root, driver string, needed image.Needed, sweep snapshot.Sweep, write func(v any, columns ...any) error) error {
	s, err := drivers.Open(root, driver, snapshot.Options{})
	if err != nil {
		return err
	}
	pinned := map[[2]string]bool{}
	for _, p := range needed.Containers {
		if p.Snapshotter == driver {
			pinned[[2]string{p.Namespace, p.Snapshot}] = true
			pinned[[2]string{"", p.Snapshot}] = true
		}
	}
	sweep.Needed = func(namespace string, i snapshot.Info) bool {
		return namespace == "" && needed.Chains[digest.Digest(i.Key)] || pinned[[2]string{namespace, i.Key}]
	}
	return s.Sweep(ctx, sweep, func(i snapshot.Info, u snapshot.Usage) error {
		record := struct {
			Snapshot    string    `json:"snapshot"`
			Snapshotter string    `json:"snapshotter"`
			Size        int64     `json:"size"`
			StoredAt    time.Time `json:"storedAt"`
		}{i.Key, driver, u.Size, i.Updated}
		return write(record, i.Key, cli.Size(u.Size), i.Updated, driver)
	})
}
