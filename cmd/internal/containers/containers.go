// Package containers is what the commands that run containers share: their flags, and the root
// filesystems that the runtime package knows nothing of.
package containers

import (
	"context"
	"os"

	"distkit/cmd/internal/cli"
	"distkit/runtime"
	"distkit/snapshot"
	"distkit/snapshot/drivers"

	"github.com/containerd/errdefs"
	"github.com/spf13/pflag"
)

// Flags says which containers are meant, and which runtime.
type Flags struct{ root, namespace, state, runtime *string }

// NewFlags registers --root, --namespace.
func NewFlags(f *pflag.FlagSet) *Flags {
	return &Flags{root: cli.Root(f), namespace: cli.Namespace(f)}
}

// Runtime registers --runtime and --state, for what starts processes.
func (o *Flags) Runtime(f *pflag.FlagSet) {
	o.runtime = f.String("runtime", "", "the OCI runtime's `NAME` or path (default: runc, else crun)")
	o.state = f.String("state", "", "the `DIR` for what runs (env DIST_STATE) (default: /run/distkit, or the user's runtime directory)")
}

// Open opens the containers.
func (o *Flags) Open() (*runtime.Containers, error) {
	return Open(*o.root, *o.namespace)
}

// Open opens the containers of a store's namespace, with the store's snapshots.
func Open(root, namespace string) (*runtime.Containers, error) {
	return runtime.Open(root, namespace, snapshots{root, namespace})
}

// Find finds the runtime: the one that is asked for, else the container's, else any.
func (o *Flags) Find(wanted string) (*runtime.Runtime, error) {
	name, state := *o.runtime, *o.state
	if name == "" {
		name = wanted
	}
	if state == "" {
		state = os.Getenv("DIST_STATE")
	}
	if state == "" {
		state = runtime.DefaultState()
	}
	return runtime.Find(name, state)
}

// Size reads a number of bytes, with a unit or without; "" is 0.
func Size(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	return runtime.ParseSize(s)
}

type snapshots struct{ root, namespace string }

func (s snapshots) open(driver string) (*snapshot.Snapshotter, error) {
	return drivers.Open(s.root, driver, snapshot.Options{Namespace: s.namespace})
}

func (s snapshots) Mount(ctx context.Context, what runtime.Snapshot, target string) error {
	sn, err := s.open(what.Driver)
	if err != nil {
		return err
	}
	return sn.Mount(ctx, what.Key, target)
}

func (s snapshots) Unmount(target string) error {
	if err := snapshot.Unmount(target); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

func (s snapshots) Remove(ctx context.Context, what runtime.Snapshot) error {
	sn, err := s.open(what.Driver)
	if err == nil {
		err = sn.Remove(ctx, what.Key)
	}
	if !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}
