package overlayfs_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/overlayfs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// users makes a user namespace that maps the IDs below 1000 to the host's from 700000 on.
func users(t *testing.T) *os.File {
	t.Helper()
	c := exec.Command("sleep", "1000")
	maps := []syscall.SysProcIDMap{{HostID: 700000, Size: 1000}}
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: maps, GidMappings: maps}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Wait() }()
	defer func() { _ = c.Process.Kill() }()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", c.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// asUser calls f in a thread with a user's and group's rights to files.
func asUser(id int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread ends with the goroutine
		_, gerr := unix.SetfsgidRetGid(id)
		_, uerr := unix.SetfsuidRetUid(id)
		done <- errors.Join(gerr, uerr, f())
	}()
	return <-done
}

// With a user namespace, a mount shows the files of every layer with mapped owners. A file made there gets the same
// owner on disk as without the namespace.
func TestMapsOwners(t *testing.T) {
	snapshottest.Root(t)
	snapshottest.Require(t, "overlay", overlayfs.Driver{}.Check(t.Context(), t.TempDir()))
	t.Parallel()
	ctx := t.Context()
	s, err := snapshot.Open(t.TempDir(), overlayfs.Driver{}, snapshot.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	owner := func(name string) string {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	plain, mapped := t.TempDir(), t.TempDir()
	must(os.Chmod(filepath.Dir(mapped), 0o711))
	parent := ""
	for i, name := range []string{"lowest", "lower"} {
		_, err := s.Prepare(ctx, "key", parent, nil)
		must(err)
		must(s.Mount(ctx, "key", plain))
		must(os.WriteFile(filepath.Join(plain, name), nil, 0o600))
		must(os.Lchown(filepath.Join(plain, name), 10+i, 20+i))
		must(snapshot.Unmount(plain))
		must(s.Commit(ctx, name, "key", snapshot.CommitOptions{}))
		parent = name
	}
	for _, key := range []string{"on layers", "without any"} {
		below := parent
		if key == "without any" {
			below = ""
		}
		_, err := s.Prepare(ctx, key, below, nil)
		must(err)
		must(s.MountWith(ctx, key, mapped, snapshot.MountOptions{Users: users(t)}))
		t.Cleanup(func() { _ = snapshot.Unmount(mapped) })
		if got := owner(mapped); got != "700000:700000" {
			t.Errorf("%s: the root directory is %s's", key, got)
		}
		if below != "" {
			for name, want := range map[string]string{"lowest": "700010:700020", "lower": "700011:700021"} {
				if got := owner(filepath.Join(mapped, name)); got != want {
					t.Errorf("%s: %s is %s's, not %s's", key, name, got, want)
				}
			}
			must(os.Chmod(filepath.Join(mapped, "lower"), 0o644)) // copies the file to the upper layer
		}
		must(asUser(700000, func() error { return os.Mkdir(filepath.Join(mapped, "dir"), 0o755) }))
		must(os.Lchown(filepath.Join(mapped, "dir"), 700005, 700006))
		if err := os.Lchown(filepath.Join(mapped, "dir"), 5, 6); !errors.Is(err, unix.EOVERFLOW) && !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: an owner that has no ID: %v", key, err)
		}
		if err := s.MountWith(ctx, key, mapped, snapshot.MountOptions{Users: users(t)}); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: mounted twice: %v", key, err)
		}
		must(snapshot.Unmount(mapped))
		must(s.Mount(ctx, key, plain))
		if got := owner(filepath.Join(plain, "dir")); got != "5:6" {
			t.Errorf("%s: without users dir is %s's", key, got)
		}
		if below != "" {
			if got := owner(filepath.Join(plain, "lower")); got != "11:21" {
				t.Errorf("%s: without users what was copied up is %s's", key, got)
			}
		}
		must(snapshot.Unmount(plain))
	}
}
