package main

import (
	"context"
	"time"

	"distkit/image"
	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/opencontainers/go-digest"
)

// alone calls a function in a phase of the sweep: see image.Sweep.
type alone = func(func(image.Needed) error) error

// sweepSnapshots deletes unneeded snapshots of all drivers.
func sweepSnapshots(root string, before time.Time, dryRun bool, deleted func(driver, key string, size int64, updated time.Time) error, failed func(error)) func(context.Context, alone) error {
	return func(ctx context.Context, alone alone) error {
		used, err := drivers.Used(root)
		if err != nil {
			return err
		}
		for _, driver := range used {
			s, err := drivers.Open(ctx, root, driver, snapshot.Options{})
			if err != nil {
				return err
			}
			o := snapshot.Sweep{Before: before, DryRun: dryRun, Failed: failed, Alone: func(f func(func(string, snapshot.Info) bool) error) error {
				return alone(func(n image.Needed) error { return f(needed(n, driver)) })
			}}
			err = s.Sweep(ctx, o, func(i snapshot.Info, u snapshot.Usage) error { return deleted(driver, i.Key, u.Size, i.Updated) })
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// needed returns a function that reports whether a snapshot of a driver must be kept.
func needed(n image.Needed, driver string) func(namespace string, i snapshot.Info) bool {
	return func(namespace string, i snapshot.Info) bool {
		return namespace == "" && n.Chains.Has(digest.Digest(i.Key)) || n.Snapshots[image.Snapshot{Driver: driver, Namespace: namespace, Key: i.Key}]
	}
}
