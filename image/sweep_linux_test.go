package image

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"distkit/content"
	"distkit/disk"

	"golang.org/x/sys/unix"
)

// A document that can't be read at all stops the sweep. The message names the image that has it.
func TestSweepStopsWhereADocumentCannotBeRead(t *testing.T) {
	f := newFixture(t)
	d := f.image("amd64", 1)
	f.name("ci", "a:1", d)
	f.add("", []byte("loose"))
	if err := os.Chmod(f.path(d.Digest), 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // root can read every file
		if err := os.Chmod(filepath.Dir(f.store.Root()), 0o755); err != nil {
			t.Fatal(err)
		}
		release, err := f.store.Exclude(t.Context(), 0) // creates the file, so that others may read it
		if err != nil {
			t.Fatal(err)
		}
		disk.Release(release)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		const nobody = 65534
		if err := unix.Setfsuid(nobody); err != nil {
			t.Fatal(err)
		}
		defer unix.Setfsuid(0)
	}
	_, err := Sweep{Store: f.store, Before: time.Now().Add(time.Hour)}.Run(t.Context(), func(content.Info) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "image a:1 of namespace ci") || f.count() != 4 {
		t.Errorf("%v; %d blobs are left", err, f.count())
	}
}
