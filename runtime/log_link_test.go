package runtime

import (
	"os"
	"path/filepath"
	"testing"

	"distkit/disk"
)

// A container's directory, or one above it, may become a link while the container runs.
func TestNothingIsWrittenOrRemovedThroughLinks(t *testing.T) {
	store, outside := t.TempDir(), t.TempDir()
	for _, name := range []string{"log", "exec"} {
		if err := os.WriteFile(filepath.Join(outside, name), []byte("x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(store, "c")); err != nil {
		t.Fatal(err)
	}
	p := place{store: disk.Tree(store), name: "c"}
	l := openLog(p, 0)
	l.write("stdout", []byte("text\n"))
	l.close()
	if b, err := os.ReadFile(filepath.Join(outside, "log")); err != nil || string(b) != "x\n" {
		t.Errorf("the log was written through a link: %q, %v", b, err)
	}
	if r, err := openReader(p, false); err == nil {
		r.close()
		t.Error("the log was read through a link")
	}
	if err := removeAll(p.store, p.file("exec")); err == nil {
		t.Error("no error of a removal through a link")
	}
	if _, err := os.Stat(filepath.Join(outside, "exec")); err != nil {
		t.Errorf("removed through a link: %v", err)
	}
}
