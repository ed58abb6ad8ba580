package runtime

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
)

func openVolumes(t *testing.T) *Containers {
	t.Helper()
	s, err := Open(t.TempDir(), "default", filepath.Join(t.TempDir(), "state"), bound{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// One of several processes fills a new volume; all have that one, and nothing else is left.
func TestVolumeOfMany(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			path, err := s.Volume("db", func(dir *os.File) error {
				return os.WriteFile(filepath.Join(dir.Name(), "filled"), nil, 0o600)
			})
			if err != nil || path != filepath.Join(s.root, "volumes/default/db") {
				t.Errorf("%s: %v", path, err)
			}
			if _, err := os.Stat(filepath.Join(path, "filled")); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if names, err := os.ReadDir(filepath.Join(s.root, "volumes/default")); err != nil || len(names) != 1 {
		t.Errorf("%v are left: %v", names, err)
	}
	for _, dir := range s.volumeDirs("") {
		if fi, err := os.Stat(filepath.Join(s.root, dir)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v: %v", dir, fi.Mode(), err)
		}
	}
}

// A volume is filled once, whole or not at all, and stays while a container's record names it.
func TestVolumeLife(t *testing.T) {
	t.Parallel()
	s := openVolumes(t)
	if _, err := s.Volume("db", func(*os.File) error { return fs.ErrInvalid }); !errors.Is(err, fs.ErrInvalid) {
		t.Fatal(err)
	}
	if all, err := s.Volumes(); len(all) != 0 || err != nil {
		t.Fatalf("%v: %v", all, err)
	}
	empty := func(*os.File) error { return nil }
	if _, err := s.Volume("db", empty); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Volume("db", func(*os.File) error { return errors.New("filled again") }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), Record{ID: "user", Volumes: []string{"db"}}, "", nil); err != nil {
		t.Fatal(err)
	}
	all, err := s.Volumes()
	if err != nil || len(all) != 1 || strings.Join(all[0].Containers, " ") != "user" {
		t.Errorf("%v: %v", all, err)
	}
	if err := s.RemoveVolume("db"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("one in use is removed: %v", err)
	}
	user, err := s.Get("user")
	if err == nil {
		_, err = user.proc("").Remove(t.Context(), false)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(s.root, "volumes/default", newVolume+"killed"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveVolume("db"); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveVolume("db"); !errdefs.IsNotFound(err) {
		t.Errorf("none is removed: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.root, "volumes")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directories are left: %v", err)
	}
}

// Names of paths, and what a stranger's store has in the place of volumes, lead nowhere.
func TestVolumeHostile(t *testing.T) {
	t.Parallel()
	empty := func(*os.File) error { return nil }
	s := openVolumes(t)
	for _, name := range []string{"", ".", "..", "a/b", "/a", "../a", "a/../b", ".new-x", "a b", "a\n", strings.Repeat("a", 77)} {
		if _, err := s.Volume(name, empty); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", name, err)
		}
		if err := s.RemoveVolume(name); !errdefs.IsInvalidArgument(err) {
			t.Errorf("remove %q: %v", name, err)
		}
	}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "kept"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, make := range map[string]func(root string) error{
		"volume is a link":     func(root string) error { return os.Symlink(outside, filepath.Join(root, "volumes/default/db")) },
		"volume is a file":     func(root string) error { return os.WriteFile(filepath.Join(root, "volumes/default/db"), nil, 0o600) },
		"namespace is a link":  func(root string) error { return relink(outside, filepath.Join(root, "volumes/default")) },
		"volumes is a link":    func(root string) error { return relink(outside, filepath.Join(root, "volumes")) },
		"others may write":     func(root string) error { return os.Chmod(filepath.Join(root, "volumes/default"), 0o777) },
		"volumes is of others": func(root string) error { return os.Chmod(filepath.Join(root, "volumes"), 0o770) },
	} {
		s := openVolumes(t)
		if err := os.MkdirAll(filepath.Join(s.root, "volumes/default"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := make(s.root); err != nil {
			t.Fatal(err)
		}
		if path, err := s.Volume("db", empty); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %s, %v", name, path, err)
		}
		_ = s.RemoveVolume("db")
		if _, err := os.Stat(filepath.Join(outside, "kept")); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// A container is not run with what a store's owner has put in the place of its volume.
func TestVolumeIsCheckedAtEachRun(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	for name, change := range map[string]func(root string) error{
		"volume is a link":     func(root string) error { return relink(outside, filepath.Join(root, "volumes/default/db")) },
		"volumes is a link":    func(root string) error { return relink(outside, filepath.Join(root, "volumes")) },
		"others may write":     func(root string) error { return os.Chmod(filepath.Join(root, "volumes/default"), 0o777) },
		"volumes is of others": func(root string) error { return os.Chown(filepath.Join(root, "volumes"), 4711, 4711) },
	} {
		s := openVolumes(t)
		if _, err := s.Volume("db", func(*os.File) error { return nil }); err != nil {
			t.Fatal(err)
		}
		c := &Container{Record: Record{Volumes: []string{"db"}}, set: s}
		if err := c.checkVolumes(); err != nil {
			t.Fatal(err)
		}
		if err := change(s.root); err != nil {
			if errors.Is(err, fs.ErrPermission) { // only root gives files away
				continue
			}
			t.Fatal(err)
		}
		if err := c.checkVolumes(); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func relink(target, name string) error {
	if err := os.RemoveAll(name); err != nil {
		return err
	}
	return os.Symlink(target, name)
}
