package runtime

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// A container is made either before a sweep begins or after it has ended, never while it deletes what the container
// pins.
func TestCreateWaitsForASweep(t *testing.T) {
	root := t.TempDir()
	hold, err := disk.LockFile(t.Context(), filepath.Join(root, "hold"), os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	all, err := Open(root, "default", t.TempDir(), bound{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := all.Create(ctx, Record{ID: "test-held"}, "", nil)
		done <- err
	}()
	// The container has claimed its ID before it waits.
	until(t, "the container's lock", func() bool {
		_, err := os.Stat(filepath.Join(root, "containers", "default", "test-held", "lock"))
		return err == nil
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("beside a sweep: %v", err)
	}
	if _, err := all.Get("test-held"); err == nil {
		t.Error("it has a record")
	}
	hold.Close()
	if _, err := all.Create(t.Context(), Record{ID: "test-held"}, "", nil); err != nil {
		t.Error(err)
	}
}
