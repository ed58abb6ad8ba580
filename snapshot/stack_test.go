package snapshot_test

import (
	"context"
	"errors"
	"os"
	"testing"

	"distkit/snapshot"
)

// Whoever reads the names of a stack is gone: the layers above the one that could not be told are called off.
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
		t.Errorf("%v; called off: %v", err, calledOff)
	}
	if got := describe(t, s); got != "low:Committed:" {
		t.Errorf("left: %q", got)
	}
}
