package erofs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// The state directory may be searched by the users of containers, but nobody else may write to it.
func TestSealsAreRootsAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	parent := filepath.Join(t.TempDir(), "state")
	was := sealDir
	sealDir = []string{parent, filepath.Join(parent, "erofs")}
	t.Cleanup(func() { sealDir = was })
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Seal(f, "text"); err != nil { // which makes both
		t.Fatal(err)
	}
	for _, c := range []struct {
		dir  string
		mode os.FileMode
		ok   bool
	}{
		{parent, 0o700, true}, {parent, 0o710, true}, {parent, 0o770, false}, {parent, 0o700, true}, {sealDir[1], 0o710, false}, {sealDir[1], 0o700, true},
	} {
		if err := os.Chmod(c.dir, c.mode); err != nil {
			t.Fatal(err)
		}
		err := Seal(f, "text")
		if c.ok && err != nil || !c.ok && !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s of mode %o: %v", c.dir, c.mode, err)
		}
	}
}
