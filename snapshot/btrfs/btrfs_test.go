package btrfs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/btrfs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
)

func TestMain(m *testing.M) { snapshottest.Main(m, btrfs.Driver{}) }

func TestSuite(t *testing.T) {
	snapshottest.Btrfs(t)
	snapshottest.Run(t, btrfs.Driver{})
}

func TestCheck(t *testing.T) {
	if err := (btrfs.Driver{}).Check(t.Context(), "/proc"); !errdefs.IsNotImplemented(err) {
		t.Errorf("on procfs: %v", err)
	}
	snapshottest.Btrfs(t)
	dir := t.TempDir()
	if err := (btrfs.Driver{}).Check(t.Context(), dir); err != nil {
		t.Errorf("on btrfs: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

func TestSubvolumes(t *testing.T) {
	snapshottest.Btrfs(t)
	ctx := t.Context()
	root := t.TempDir()
	s, err := snapshot.Open(root, btrfs.Driver{}, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	subvolumes := func() string {
		out, err := exec.Command("btrfs", "subvolume", "list", "-o", root).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	m, err := s.Prepare(ctx, "a", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	// 8 MiB in the parent, 1 MiB in the child.
	if err := os.WriteFile(filepath.Join(m[0].Source, "large"), make([]byte, 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, "base", "a", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	if m, err = s.Prepare(ctx, "b", "base", nil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m[0].Source, "small"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	// A subvolume inside a snapshot must not keep it from being removed.
	inside := filepath.Join(m[0].Source, "inside")
	if out, err := exec.Command("btrfs", "subvolume", "create", inside).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(inside, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	exec.Command("sync", "-f", root).Run()
	base, err := s.Usage(ctx, "base")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Usage(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	if base.Size < 8<<20 || b.Size < 1<<20 || b.Size > 2<<20 || b.Inodes != 4 {
		t.Errorf("usage: base %+v, child %+v", base, b)
	}
	if n := len(subvolumes()); n == 0 {
		t.Error("no subvolumes")
	}
	for _, key := range []string{"b", "base"} {
		if err := s.Remove(ctx, key); err != nil {
			t.Error(err)
		}
	}
	if left := subvolumes(); left != "" {
		t.Errorf("left: %s", left)
	}
}
