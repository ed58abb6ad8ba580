package cli

import (
	"context"
	"io"
	"os"
	"time"
)

// LayerStdin is Stdin for a layer. It is read as it is where reads never wait, else so that a signal ends them, and a failure of what
// reads the layer does too.
func LayerStdin(ctx context.Context) (io.ReadCloser, error) {
	if info, err := os.Stdin.Stat(); err == nil && info.Mode().IsRegular() {
		return os.Stdin, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	in, err := Stdin(ctx)
	return waiting{in, cancel}, err
}

type waiting struct {
	io.ReadCloser
	cancel context.CancelFunc
}

// SetReadDeadline ends a read that waits: the only deadline that is set is now.
func (w waiting) SetReadDeadline(time.Time) error {
	w.cancel()
	return nil
}
