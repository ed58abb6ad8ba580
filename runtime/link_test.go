package runtime

import (
	"os"
	"path/filepath"
	"testing"

	"distkit/disk"
)

// While a container runs, its directory or one above it may be replaced by a symbolic link. Nothing is removed through
// it.
func TestNothingIsRemovedThroughLinks(t *testing.T) {
	store, outside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "exec"), []byte("x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(store, "c")); err != nil {
		t.Fatal(err)
	}
	if err := removeAll(disk.Tree(store), "c/exec"); err == nil {
		t.Error("no error of a removal through a link")
	}
	if _, err := os.Stat(filepath.Join(outside, "exec")); err != nil {
		t.Errorf("removed through a link: %v", err)
	}
}
