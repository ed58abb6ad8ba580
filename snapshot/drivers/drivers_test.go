package drivers_test

import (
	"os"
	"path/filepath"
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

// A store keeps its first driver, even if a preferred one works now.
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

// Programs on PATH are drivers, but must be named by the user. Neither a store nor a record in it selects one.
func TestPrograms(t *testing.T) {
	scripts, err := filepath.Abs("../../scripts")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for _, name := range []string{"snap-driver-native", "snap-driver-Bad", "snap-driver-a.b", "snap-driver-", "snap-driver--x"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\ntouch "+bin+"/called\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":"+scripts+":"+os.Getenv("PATH"))
	t.Setenv("CONTAINERD_SNAPSHOTTER", "")
	root := t.TempDir()
	s, err := drivers.Open(t.Context(), root, "cp", snapshot.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "a", "", nil); err != nil {
		t.Fatal(err)
	}
	if got := driverOf(t, root, ""); got == "cp" {
		t.Error("a store has chosen a program")
	}
	names := func() (names []string) {
		for _, d := range drivers.List(t.Context(), root) {
			names = append(names, d.Driver)
			if d.Driver == "cp" && (!d.Works || !d.Used || d.Default) {
				t.Errorf("%+v", d)
			}
		}
		return names
	}
	if got := names(); !slices.Equal(got, append(drivers.Names(), "cp")) {
		t.Errorf("the drivers are %q", got)
	}
	for _, name := range []string{"Bad", "a.b", "-x", "../x", "none", "cp/../cp"} {
		if _, err := drivers.Open(t.Context(), root, name, snapshot.Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := drivers.OpenRecorded(t.Context(), root, "cp", snapshot.Options{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("a record has chosen a program: %v", err)
	}
	if _, err := drivers.OpenRecorded(t.Context(), root, "native", snapshot.Options{}); err != nil {
		t.Errorf("a record of a built-in driver: %v", err)
	}
	if used, err := drivers.Used(root); err != nil || len(used) != 0 {
		t.Errorf("used are %q, %v", used, err)
	}
	t.Setenv("CONTAINERD_SNAPSHOTTER", "cp")
	if _, err := drivers.OpenRecorded(t.Context(), root, "cp", snapshot.Options{}); err != nil {
		t.Errorf("a record that names what the environment names: %v", err)
	}
	if used, err := drivers.Used(root); err != nil || !slices.Equal(used, []string{"cp"}) {
		t.Errorf("used are %q, %v", used, err)
	}
	if _, err := os.Stat(filepath.Join(bin, "called")); err == nil {
		t.Error("a program was called whose name is not a driver's, or is a built-in driver's")
	}
}

func TestList(t *testing.T) {
	t.Setenv("PATH", "")
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
