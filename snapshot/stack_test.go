package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
)

// If done fails, for example because its output is closed, the layers above are cancelled.
func TestStackEndsWithItsReader(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), drivers["overlayfs"])
	gone := errors.New("nobody reads")
	calledOff, begun := false, make(chan struct{})
	low := snapshot.Layer{Name: "low", Apply: func(context.Context, snapshot.Place) error { <-begun; return nil }}
	high := snapshot.Layer{Name: "high", Apply: func(ctx context.Context, p snapshot.Place) error {
		close(begun)
		if err := os.WriteFile(p.Unresolved, nil, 0o600); err != nil {
			return err
		}
		<-ctx.Done()
		calledOff = true
		return ctx.Err()
	}}
	if err := s.Stack(t.Context(), "", []snapshot.Layer{low, high}, 2, func(string) error { return gone }); err != gone || !calledOff {
		t.Errorf("%v; the others: %v", err, calledOff)
	}
	if got := describe(t, s); got != "low:Committed:" {
		t.Errorf("left: %q", got)
	}
}

// layersAbove returns n layers. The lowest one is applied last.
func layersAbove(n int, lowest func() error) (list []snapshot.Layer) {
	var applied sync.WaitGroup
	applied.Add(n - 1)
	for i := range n {
		list = append(list, snapshot.Layer{Name: fmt.Sprint("layer", i), Apply: func(_ context.Context, p snapshot.Place) error {
			if i == 0 {
				applied.Wait()
				return lowest()
			}
			defer applied.Done()
			return errors.Join(os.WriteFile(filepath.Join(p.Dir, fmt.Sprint("file", i)), nil, 0o600), os.WriteFile(p.Unresolved, nil, 0o600))
		}})
	}
	return list
}

// Another process makes a layer, without the lock on its name, after the layers above were settled on our own version.
// These are applied again, on the other process's.
func TestStackOnAnothersLayer(t *testing.T) {
	snapshottest.Root(t)
	s := open(t, t.TempDir(), drivers["overlayfs"])
	ctx := t.Context()
	if err := prepare(s, "other", ""); err != nil {
		t.Fatal(err)
	}
	var begun atomic.Bool
	snapshot.OnStep(func(step string) {
		if step == "synced" && begun.CompareAndSwap(false, true) {
			if err := s.Commit(ctx, "layer0", "other", snapshot.CommitOptions{}); err != nil {
				t.Error(err)
			}
		}
	})
	defer snapshot.OnStep(func(string) {})
	applied := make(chan struct{})
	low := snapshot.Layer{Name: "layer0", Apply: func(context.Context, snapshot.Place) error { <-applied; return nil }}
	high := snapshot.Layer{Name: "layer1", Apply: func(_ context.Context, p snapshot.Place) error {
		if p.Unresolved == "" {
			return os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/again", p.File.Fd()), nil, 0o600)
		}
		defer close(applied)
		return os.WriteFile(p.Unresolved, nil, 0o600)
	}}
	if err := s.Stack(ctx, "", []snapshot.Layer{low, high}, 2, func(string) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := describe(t, s); got != "layer0:Committed: layer1:Committed:layer0" {
		t.Error(got)
	}
	dir := t.TempDir()
	if _, err := s.View(ctx, "view", "layer1", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Mount(ctx, "view", dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "again")); err != nil {
		t.Errorf("layer1 was not applied again: %v", err)
	}
	if err := snapshot.Unmount(dir); err != nil {
		t.Error(err)
	}
}

// If a snapshot's record is changed while it is committed, the commit is repeated, and so are those of the layers above
// in the same batch.
func TestStackOfAChangedLayer(t *testing.T) {
	s := open(t, t.TempDir(), drivers["overlayfs"])
	var synced atomic.Int32
	snapshot.OnStep(func(step string) {
		if step == "synced" && synced.Add(1) == 1 {
			if _, err := s.Update(t.Context(), snapshot.Info{Key: "stack layer0", Labels: map[string]string{"a": "b"}}); err != nil {
				t.Error(err)
			}
		}
	})
	defer snapshot.OnStep(func(string) {})
	err := s.Stack(t.Context(), "", layersAbove(4, func() error { return nil }), 4, func(string) error { return nil })
	if err != nil {
		t.Error(err)
	}
	if got := describe(t, s); got != "layer0:Committed: layer1:Committed:layer0 layer2:Committed:layer1 layer3:Committed:layer2" {
		t.Errorf("the store has: %q", got)
	}
}

// shallow is a driver that mounts only a few layers.
type shallow struct{ snapshot.Driver }

func (shallow) MaxParents() int { return 2 }

func (d shallow) Settle(ctx context.Context, t snapshot.Tree, unresolved io.Reader) error {
	if len(t.Parents) > d.MaxParents() {
		return errors.New("it is settled on more layers than can be mounted")
	}
	return d.Driver.Settle(ctx, t, unresolved)
}

// Of a stack that is too deep, the layers that can be mounted are made, and the error says so.
func TestStackTooDeep(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), shallow{drivers["overlayfs"]})
	err := s.Stack(t.Context(), "", layersAbove(5, func() error { return nil }), 5, func(string) error { return nil })
	if !errdefs.IsFailedPrecondition(err) || !strings.HasSuffix(err.Error(), "parent layer2 makes 3 layers below, and overlayfs mounts at most 2") {
		t.Error(err)
	}
	if got := describe(t, s); got != "layer0:Committed: layer1:Committed:layer0 layer2:Committed:layer1" {
		t.Errorf("the store has: %q", got)
	}
}

// If the lowest layer fails, no layer that waits for it is left, nor any temporary snapshot.
func TestStackOnAFailure(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), drivers["overlayfs"])
	bad := errors.New("bad layer")
	err := s.Stack(t.Context(), "", layersAbove(5, func() error { return bad }), 5, func(name string) error { t.Error(name); return nil })
	if !errors.Is(err, bad) || !strings.HasPrefix(err.Error(), "layer0: ") {
		t.Error(err)
	}
	if got := describe(t, s); got != "" {
		t.Errorf("left: %q", got)
	}
}
