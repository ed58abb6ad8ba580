package snapshot_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"distkit/snapshot"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// losses maps the sample's name of a property to a function that makes a file lose it.
var losses = map[string]func(dir string) error{
	"owner":  func(dir string) error { return os.Lchown(filepath.Join(dir, "file"), os.Geteuid(), os.Getegid()) },
	"mode":   func(dir string) error { return os.Chmod(filepath.Join(dir, "file"), 0o644) },
	"device": func(dir string) error { return os.Remove(filepath.Join(dir, "device")) },
	"empty":  func(dir string) error { return os.Remove(filepath.Join(dir, "empty")) },
	"link": func(dir string) error {
		link := filepath.Join(dir, "link")
		if err := os.Remove(link); err != nil {
			return err
		}
		return os.WriteFile(link, nil, 0o600)
	},
	"user.distkit":        loseXattr("user.distkit"),
	"trusted.distkit":     loseXattr("trusted.distkit"),
	"security.capability": loseXattr("security.capability"),
}

func loseXattr(name string) func(string) error {
	return func(dir string) error { return unix.Removexattr(filepath.Join(dir, "file"), name) }
}

// A store that was copied completely is used as before. If the copy has lost a property of files, its snapshots can be
// listed and removed, but not used. After they are removed, new ones can be made.
func TestACopyThatHasLostSomething(t *testing.T) {
	t.Parallel()
	origin := t.TempDir()
	of := func(root string) *snapshot.Snapshotter { return open(t, root, drivers["overlayfs"]) }
	s := of(origin)
	below := commit(t, s, "below", "")
	if err := prepare(s, "active", below); err != nil {
		t.Fatal(err)
	}
	made, err := os.ReadFile(filepath.Join(origin, "snapshots", "overlayfs", "sample", "made"))
	if err != nil {
		t.Fatal(err)
	}
	properties := strings.Fields(string(made))
	if os.Geteuid() == 0 && len(properties) < len(losses) {
		t.Errorf("root's sample has only %q", properties)
	}
	for _, property := range append(properties, "") {
		t.Run("without "+property, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			if out, err := exec.Command("cp", "-a", origin+"/.", root).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			lose := losses[property]
			if lose != nil {
				if err := lose(filepath.Join(root, "snapshots", "overlayfs", "sample")); err != nil {
					t.Fatal(err)
				}
			}
			s := of(root)
			_, mounts := s.Mounts(t.Context(), "active")
			_, stat := s.Stat(t.Context(), below)
			for what, err := range map[string]error{
				"mounts": mounts, "stat": stat,
				"prepare without a parent": prepare(s, "first", ""),
				"prepare":                  prepare(s, "second", below),
				"commit":                   s.Commit(t.Context(), "third", "active", snapshot.CommitOptions{}),
			} {
				if lose == nil && err != nil || lose != nil && !(errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), property)) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if lose == nil {
				return
			}
			for _, key := range []string{"active", below} {
				if err := s.Remove(t.Context(), key); err != nil {
					t.Error(err)
				}
			}
			if err := prepare(s, "new", commit(t, s, "again", "")); err != nil {
				t.Errorf("in place of those that are gone: %v", err)
			}
		})
	}
}

// A store from before there were samples has none, and is used as it is.
func TestAStoreWithoutASample(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s := open(t, root, drivers["overlayfs"])
	below := commit(t, s, "below", "")
	if err := os.RemoveAll(filepath.Join(root, "snapshots", "overlayfs", "sample")); err != nil {
		t.Fatal(err)
	}
	if err := prepare(s, "above", below); err != nil {
		t.Error(err)
	}
}
