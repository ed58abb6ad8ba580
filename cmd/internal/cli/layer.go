package cli

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"distkit/errclass"
)

// LayerStdin is Stdin for a layer. A read that waits for a writer ends when ctx is done or a deadline is set. A regular
// file never waits, and is returned as it is.
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

// SetReadDeadline ends a read that waits. The only deadline used is "now".
func (w waiting) SetReadDeadline(time.Time) error {
	w.cancel()
	return nil
}

// Counts formats the number of a layer's entries by kind of loss, sorted by kind, as one line.
func Counts(entries map[string]int64) string {
	var list []string
	for _, kind := range slices.Sorted(maps.Keys(entries)) {
		list = append(list, fmt.Sprintf("%s of %d entries", kind, entries[kind]))
	}
	return errclass.OneLine(strings.Join(list, ", "))
}
