// Package archive_test tests the differ and the applier together with continuity's FSSuite: every change of a tree goes
// through a layer.
package archive_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"distkit/archive"

	"github.com/containerd/continuity/fs/fstest"
)

type trees struct{ t *testing.T }

// base is the context key of the directory in which a test's changes are applied one after another.
type base struct{}

func (s trees) TestContext(ctx context.Context) (context.Context, func(), error) {
	dir, err := os.MkdirTemp("", "lower-")
	return context.WithValue(ctx, base{}, dir), func() { os.RemoveAll(dir) }, err
}

func (s trees) Apply(ctx context.Context, change fstest.Applier) (string, func(), error) {
	lower := ctx.Value(base{}).(string)
	upper := filepath.Join(s.t.TempDir(), "upper")
	if err := exec.Command("cp", "-a", lower, upper).Run(); err != nil {
		return "", nil, err
	}
	if err := change.Apply(upper); err != nil {
		return "", nil, err
	}
	var layer bytes.Buffer
	written, err := archive.Diff(ctx, &layer, lower, upper, archive.DiffOptions{})
	if err != nil {
		return "", nil, err
	}
	_, err = archive.Apply(ctx, lower, &layer, archive.Options{ExpectDiffID: written.DiffID, Strict: true})
	return lower, nil, err
}

func TestFSSuite(t *testing.T) {
	fstest.FSSuite(t, trees{t})
}
