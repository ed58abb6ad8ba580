package drivers_test

import (
	"os"
	"slices"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/drivers"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
)

func driverOf(t *testing.T, root, name string) string {
	t.Helper()
	s, err := drivers.Open(t.Context(), root, name, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s.Driver()
}

// A store stays with the driver it began with, whatever works better.
func TestChoiceStays(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	preferred := driverOf(t, root, "")
	if left, err := os.ReadDir(root); err != nil || len(left) > 0 {
		t.Errorf("choosing left %v, %v", left, err)
	}
	s, err := drivers.Open(t.Context(), root, "native", snapshot.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "a", "", nil); err != nil {
		t.Fatal(err)
	}
	if got := driverOf(t, root, ""); got != "native" {
		t.Errorf("a store with native snapshots is opened with %s", got)
	}
	if got := driverOf(t, root, preferred); got != preferred {
		t.Errorf("asked for %s, got %s", preferred, got)
	}
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if got := driverOf(t, root, ""); got != preferred {
		t.Errorf("an empty store is opened with %s, not %s", got, preferred)
	}
}

func TestUnknown(t *testing.T) {
	if _, err := drivers.Open(t.Context(), t.TempDir(), "zfs", snapshot.Options{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown driver: %v", err)
	}
}

func TestList(t *testing.T) {
	all := drivers.List(t.Context(), t.TempDir())
	defaults := 0
	for i, d := range all {
		if d.Driver != drivers.Names()[i] || d.Works != (d.Reason == "") || d.Used {
			t.Errorf("%+v", d)
		}
		if d.Default {
			defaults++
		}
	}
	if defaults != 1 || !slices.ContainsFunc(all, func(d drivers.Status) bool { return d.Driver == "native" && d.Works }) {
		t.Errorf("%+v", all)
	}
}
