// Package snapshot_test runs containerd's suite for snapshotters on distkit's snapshotters.
package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"distkit/archive"
	"distkit/snapshot"
	"distkit/snapshot/btrfs"
	"distkit/snapshot/drivers"
	"distkit/snapshot/erofs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/filters"
)

func TestSnapshotterSuite(t *testing.T) {
	snapshottest.Root(t)
	scripts, err := filepath.Abs("../../../scripts")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", scripts+":"+os.Getenv("PATH"))
	for _, name := range append(drivers.Names(), "cp") { // cp is a driver that is a program
		// If the name is overlayfs, the suite expects that directories of a lower layer can't be renamed.
		t.Run(name, func(t *testing.T) {
			if name == btrfs.Name {
				// The suite's cases are parallel, so t.Setenv can't be used.
				was := os.Getenv("TMPDIR")
				t.Cleanup(func() { os.Setenv("TMPDIR", was) })
				os.Setenv("TMPDIR", snapshottest.MountBtrfs(t))
			}
			testsuite.SnapshotterSuite(t, name, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := drivers.Open(ctx, root, name, snapshot.Options{Diff: diff})
				if err != nil {
					return nil, nil, err
				}
				a := adapter{s: s}
				if name == erofs.Name {
					a.places = t.TempDir()
				}
				return a, a.Close, nil
			})
		})
	}
}

func diff(ctx context.Context, upper *os.File, w io.Writer) error {
	_, err := archive.Diff(ctx, w, "", fmt.Sprintf("/proc/self/fd/%d/.", upper.Fd()), archive.DiffOptions{Overlay: true, Compression: archive.Uncompressed})
	return err
}

// adapter adapts distkit's Snapshotter to containerd's interface.
type adapter struct {
	s *snapshot.Snapshotter
	// places has the directories at which snapshots are mounted if containerd's library can't make the driver's mounts.
	// The suite gets bind mounts of them.
	places string
}

func (a adapter) place(key string) string { return filepath.Join(a.places, fmt.Sprintf("%x", key)) }

func (a adapter) mounts(ctx context.Context, key string, in []snapshot.Mount, err error) ([]mount.Mount, error) {
	if err != nil || a.places == "" {
		return mounts(in), err
	}
	i, err := a.s.Stat(ctx, key)
	if err == nil {
		err = os.MkdirAll(a.place(key), 0o700)
	}
	if err == nil {
		err = a.s.Mount(ctx, key, a.place(key))
	}
	access := "rw"
	if i.Kind == snapshot.View {
		access = "ro"
	}
	return []mount.Mount{{Type: "bind", Source: a.place(key), Options: []string{"rbind", access}}}, err
}

func (a adapter) unmount(key string) error {
	if _, err := os.Stat(a.place(key)); a.places == "" || err != nil {
		return nil
	}
	return errors.Join(snapshot.Unmount(a.place(key)), os.Remove(a.place(key)))
}

func labels(opts []snapshots.Opt) (snapshots.Info, error) {
	var i snapshots.Info
	for _, o := range opts {
		if err := o(&i); err != nil {
			return i, err
		}
	}
	return i, nil
}

func (a adapter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	i, err := labels(opts)
	if err != nil {
		return nil, err
	}
	m, err := a.s.Prepare(ctx, key, parent, i.Labels)
	return a.mounts(ctx, key, m, err)
}

func (a adapter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	i, err := labels(opts)
	if err != nil {
		return nil, err
	}
	m, err := a.s.View(ctx, key, parent, i.Labels)
	return a.mounts(ctx, key, m, err)
}

func (a adapter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	i, err := labels(opts)
	if err != nil {
		return err
	}
	if err := a.unmount(key); err != nil {
		return err
	}
	// The suite commits snapshots while they are mounted.
	return a.s.Commit(ctx, name, key, snapshot.CommitOptions{Parent: i.Parent, Labels: i.Labels, Mounted: true})
}

func (a adapter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	m, err := a.s.Mounts(ctx, key)
	return a.mounts(ctx, key, m, err)
}

func mounts(in []snapshot.Mount) (out []mount.Mount) {
	for _, m := range in {
		out = append(out, mount.Mount{Type: m.Type, Source: m.Source, Options: m.Options})
	}
	return out
}

func (a adapter) Remove(ctx context.Context, key string) error {
	return errors.Join(a.unmount(key), a.s.Remove(ctx, key))
}

func (a adapter) Close() error {
	places, err := os.ReadDir(a.places)
	if a.places == "" {
		return nil
	}
	for _, p := range places {
		dir := filepath.Join(a.places, p.Name())
		err = errors.Join(err, snapshot.Unmount(dir), os.Remove(dir))
	}
	return err
}

func (a adapter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	i, err := a.s.Stat(ctx, key)
	return info(i), err
}

func (a adapter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	u, err := a.s.Usage(ctx, key)
	return snapshots.Usage{Size: u.Size, Inodes: u.Inodes}, err
}

func (a adapter) Update(ctx context.Context, i snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	u, err := a.s.Update(ctx, snapshot.Info{Key: i.Name, Labels: i.Labels}, fieldpaths...)
	return info(u), err
}

func (a adapter) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	return a.s.Walk(ctx, func(ctx context.Context, i snapshot.Info) error {
		if !filter.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			switch {
			case len(path) == 0:
			case path[0] == "kind":
				return strings.ToLower(string(i.Kind)), true
			case path[0] == "name":
				return i.Key, true
			case path[0] == "parent":
				return i.Parent, true
			case path[0] == "labels":
				v, ok := i.Labels[strings.Join(path[1:], ".")]
				return v, ok
			}
			return "", false
		})) {
			return nil
		}
		return fn(ctx, info(i))
	})
}

func info(i snapshot.Info) snapshots.Info {
	return snapshots.Info{
		Name: i.Key, Parent: i.Parent, Labels: i.Labels, Created: i.Created, Updated: i.Updated,
		Kind: map[snapshot.Kind]snapshots.Kind{
			snapshot.View: snapshots.KindView, snapshot.Active: snapshots.KindActive, snapshot.Committed: snapshots.KindCommitted,
		}[i.Kind],
	}
}
