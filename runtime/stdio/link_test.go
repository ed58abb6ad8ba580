package stdio

import (
	"os"
	"path/filepath"
	"testing"

	"distkit/disk"
)

// While a container runs, its directory or one above it may be replaced by a symbolic link. Logs are neither written
// nor read through it.
func TestNothingIsWrittenOrReadThroughLinks(t *testing.T) {
	store, outside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "log"), []byte("x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(store, "c")); err != nil {
		t.Fatal(err)
	}
	d := Dir{disk.Tree(store), "c"}
	if l, err := NewWriter(d, 0); err == nil {
		l.Write("stdout", []byte("text\n"))
		l.Close()
		t.Error("the log was opened through a link")
	}
	if b, err := os.ReadFile(filepath.Join(outside, "log")); err != nil || string(b) != "x\n" {
		t.Errorf("the log was written through a link: %q, %v", b, err)
	}
	if r, err := NewReader(d, false); err == nil {
		r.Close()
		t.Error("the log was read through a link")
	}
}
