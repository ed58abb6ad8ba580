package copygraph

import (
	"context"
	"io"
	"testing"

	"distkit/batch"

	"github.com/containerd/errdefs"
)

// A peer that was killed while it had no request fails the next request with an error that another peer may avoid. The
// request after that goes to another peer.
func TestAKilledPeerIsGone(t *testing.T) {
	t.Parallel()
	source := FromServer(func(ctx context.Context, in io.Reader, out io.Writer) error { return batch.Serve(ctx, in, out, nil) }, nil)
	killed, _, err := source.pick(0)
	if err != nil {
		t.Fatal(err)
	}
	killed.kill()
	_, err = killed.Request("latest")
	if err = killed.failed(t.Context(), err); !temporary(err) {
		t.Errorf("a request to a killed peer: %v", err)
	}
	next, _, err := source.pick(0)
	if err != nil || next == killed {
		t.Errorf("the next peer is the killed one: %t, %v", next == killed, err)
	}
	if err := source.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if _, err = next.Request("latest"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a request after Close: %v", err)
	}
}
