package erofs

import (
	"bytes"
	"os"
	"testing"

	"github.com/containerd/errdefs"
)

// The limit of bytes counts the holes of sparse files. After a failure the directory is empty.
func TestStoreLimits(t *testing.T) {
	t.Parallel()
	holes, err := os.ReadFile("testdata/sparse.tar")
	if err != nil {
		t.Fatal(err)
	}
	for most, is := range map[int64]func(error) bool{
		0:                     func(err error) bool { return err == nil },
		int64(len(holes)):     errdefs.IsFailedPrecondition, // exceeded by its files
		int64(len(holes)) / 2: errdefs.IsFailedPrecondition,
	} {
		dir := t.TempDir()
		_, err := Store(t.Context(), dir, bytes.NewReader(holes), StoreOptions{MaxBytes: most})
		if !is(err) {
			t.Errorf("at most %d bytes: %v", most, err)
		}
		if left, rerr := os.ReadDir(dir); rerr != nil || (len(left) == 0) != (err != nil) {
			t.Errorf("at most %d bytes: %v, and there are %v, %v", most, err, left, rerr)
		}
		unseal(t, dir)
	}
}

// unseal removes the seal of a stored layer.
func unseal(t *testing.T, dir string) {
	t.Helper()
	if f, err := os.Open(dir + "/" + layerName); err == nil {
		Unseal(f)
		f.Close()
	}
}
