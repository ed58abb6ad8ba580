package native_test

import (
	"os"
	"path/filepath"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/native"
	"distkit/snapshot/snapshottest"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { snapshottest.Main(m, native.Driver{}) }

func TestSuite(t *testing.T) { snapshottest.Run(t, native.Driver{}) }

// on btrfs, where files are cloned
func TestSuiteWithReflinks(t *testing.T) {
	snapshottest.Btrfs(t)
	snapshottest.Run(t, native.Driver{})
}

// A mount below a mounted snapshot must not appear in the store, even if the store is on a shared mount: it would be
// deleted with the snapshot.
func TestMountIsPrivate(t *testing.T) {
	snapshottest.Root(t)
	root, mnt := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	if err := unix.Mount("", root, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.Open(root, native.Driver{}, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Prepare(t.Context(), "a", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Mount(t.Context(), "a", mnt); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	inside := filepath.Join(mnt, "inside")
	if err := os.Mkdir(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", inside, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(inside, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(m[0].Source, "inside/precious")); err == nil {
		t.Error("what was mounted on the snapshot appears in the store")
	}
}
