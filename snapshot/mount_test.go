package snapshot_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
)

// MountWith excludes Commit and Remove of the same snapshot, and the other way round, at every step of either.
func TestMountExcludesCommitAndRemove(t *testing.T) {
	snapshottest.Root(t)
	for name, d := range drivers {
		for _, c := range []struct {
			do, at, beside string
		}{
			{"remove", "not mounted", "mount"},
			{"commit", "synced", "mount"},
			{"commit", "record written", "mount"},
			{"commit", "synced", "remove"},
			{"mount", "mounting", "remove"},
			{"mount", "mounting", "commit"},
		} {
			t.Run(name+"/"+c.beside+" while "+c.do+" is "+c.at, func(t *testing.T) {
				onItsFilesystem(t, d)
				ctx, root, mnt := t.Context(), t.TempDir(), t.TempDir()
				s := open(t, root, d)
				for _, err := range []error{
					prepare(s, "low", ""), s.Commit(ctx, "base", "low", snapshot.CommitOptions{}), prepare(s, "key", "base"),
				} {
					if err != nil {
						t.Fatal(err)
					}
				}
				t.Cleanup(func() { _ = snapshot.Unmount(mnt) })
				calls := map[string]func() error{
					"mount":  func() error { return s.Mount(ctx, "key", mnt) },
					"commit": func() error { return s.Commit(ctx, "done", "key", snapshot.CommitOptions{}) },
					"remove": func() error { return s.Remove(ctx, "key") },
				}
				beside := errors.New("never called")
				snapshot.OnStep(func(at string) {
					if at == c.at {
						snapshot.OnStep(func(string) {})
						beside = calls[c.beside]()
					}
				})
				defer snapshot.OnStep(func(string) {})
				if err := calls[c.do](); err != nil {
					t.Error(err)
				}
				if !errdefs.IsUnavailable(beside) {
					t.Errorf("%s beside: %v", c.beside, beside)
				}
				want := map[string]string{
					"remove": "base:Committed:", "commit": "base:Committed: done:Committed:base", "mount": "base:Committed: key:Active:base",
				}[c.do]
				if got := describe(t, s); got != want {
					t.Errorf("there is %q, not %q", got, want)
				}
				if err := os.WriteFile(filepath.Join(mnt, "file"), nil, 0o644); err != nil {
					t.Error(err)
				}
				if _, err := os.Lstat(filepath.Join(root, "snapshots", d.Name(), "2/fs/file")); (err == nil) != (c.do == "mount") {
					t.Errorf("what is written to the directory is in the snapshot: %v", err)
				}
			})
		}
	}
}

// A mount that another one covers is found too.
func TestCoveredMount(t *testing.T) {
	snapshottest.Root(t)
	for name, d := range drivers {
		t.Run(name, func(t *testing.T) {
			onItsFilesystem(t, d)
			ctx, root, mnt := t.Context(), t.TempDir(), t.TempDir()
			s := open(t, root, d)
			if err := prepare(s, "key", ""); err != nil {
				t.Fatal(err)
			}
			if err := s.Mount(ctx, "key", mnt); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = snapshot.Unmount(mnt) })
			if err := syscall.Mount("none", mnt, "tmpfs", 0, "size=64k"); err != nil {
				t.Skip("needs tmpfs")
			}
			err := s.Remove(ctx, "key")
			if uerr := syscall.Unmount(mnt, 0); uerr != nil {
				t.Fatal(uerr)
			}
			if !errdefs.IsUnavailable(err) {
				t.Errorf("remove: %v", err)
			}
		})
	}
}

// Foreign files in a store, such as links, FIFOs and huge files, are not followed, waited for, or read without limit.
func TestHostileStore(t *testing.T) {
	big := func(name string) error { return errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, 2<<30)) }
	fifo := func(name string) error { return syscall.Mkfifo(name, 0o600) }
	for driver, d := range drivers {
		onItsFilesystemOrSkip := func(t *testing.T) { onItsFilesystem(t, d) }
		for _, what := range []string{"snapshots", "snapshots/DRIVER", "snapshots/DRIVER/keys", "snapshots/DRIVER/tmp", "snapshots/DRIVER/state",
			"snapshots/DRIVER/2", "snapshots/DRIVER/2/info", "snapshots/DRIVER/2/fs", "snapshots/DRIVER/1/fs", "oci-layout"} {
			for kind, make := range map[string]func(name, outside string) error{
				"link":    func(name, outside string) error { return os.Symlink(outside, name) },
				"loop":    func(name, _ string) error { return os.Symlink(filepath.Base(name), name) },
				"fifo":    func(name, _ string) error { return fifo(name) },
				"large":   func(name, _ string) error { return big(name) },
				"garbage": func(name, _ string) error { return os.WriteFile(name, []byte("\x1b[31m\x00\xff{"), 0o600) },
				"empty":   func(name, _ string) error { return os.WriteFile(name, nil, 0o600) },
				"dir":     func(name, _ string) error { return os.Mkdir(name, 0o700) },
			} {
				t.Run(strings.Join([]string{driver, kind, what}, "/"), func(t *testing.T) {
					onItsFilesystemOrSkip(t)
					ctx, root, mnt, outside := t.Context(), t.TempDir(), t.TempDir(), t.TempDir()
					s := open(t, root, d)
					for _, err := range []error{
						prepare(s, "low", ""), s.Commit(ctx, "base", "low", snapshot.CommitOptions{}), prepare(s, "key", "base"),
						os.WriteFile(filepath.Join(outside, "info"), []byte("{}"), 0o600), os.Chmod(outside, 0o500),
					} {
						if err != nil {
							t.Fatal(err)
						}
					}
					name := filepath.Join(root, strings.ReplaceAll(what, "DRIVER", d.Name()))
					if err := errors.Join(os.RemoveAll(name), make(name, outside)); err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = errors.Join(snapshot.Unmount(mnt), os.Chmod(outside, 0o700)) })
					s, err := snapshot.Open(root, d, snapshot.Options{})
					if err == nil {
						_, _ = s.Stat(ctx, "key")
						_, _ = s.Usage(ctx, "key")
						if err := s.Mount(ctx, "key", mnt); err == nil && os.Geteuid() == 0 {
							_ = os.WriteFile(filepath.Join(mnt, "written"), nil, 0o644)
							_ = snapshot.Unmount(mnt)
						}
						_ = prepare(s, "new", "base")
						_ = prepare(s, "alone", "")
						_ = s.Commit(ctx, "done", "key", snapshot.CommitOptions{})
						_ = s.Remove(ctx, "key")
						_ = s.Remove(ctx, "new")
					}
					left, err := os.ReadDir(outside)
					if err != nil || len(left) != 1 {
						t.Errorf("outside: %v, %v", left, err)
					}
					if fi, err := os.Stat(outside); err != nil || fi.Mode().Perm() != 0o500 {
						t.Errorf("outside: %v, %v", fi, err)
					}
				})
			}
		}
	}
}

// A snapshot of another store is not mistaken for this one's, even with the same path in its file system.
func TestMountOfAnotherStore(t *testing.T) {
	snapshottest.Root(t)
	var stores [2]*snapshot.Snapshotter
	for i := range stores {
		disk := t.TempDir()
		if err := syscall.Mount("none", disk, "tmpfs", 0, "size=1m"); err != nil {
			t.Skip("needs tmpfs")
		}
		t.Cleanup(func() { _ = syscall.Unmount(disk, syscall.MNT_DETACH) })
		stores[i] = open(t, disk, drivers["native"])
		if err := prepare(stores[i], "key", ""); err != nil {
			t.Fatal(err)
		}
	}
	mnt := t.TempDir()
	if err := stores[0].Mount(t.Context(), "key", mnt); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = snapshot.Unmount(mnt) })
	if err := stores[1].Remove(t.Context(), "key"); err != nil {
		t.Error(err)
	}
	if err := stores[0].Remove(t.Context(), "key"); !errdefs.IsUnavailable(err) {
		t.Errorf("remove of the mounted one: %v", err)
	}
}
