package overlayfs_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/overlayfs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
)

func TestMain(m *testing.M) { snapshottest.Main(m, overlayfs.Driver{}) }

func TestSuite(t *testing.T) {
	snapshottest.Root(t)
	snapshottest.Require(t, "overlay", overlayfs.Driver{}.Check(t.Context(), t.TempDir()))
	snapshottest.Run(t, overlayfs.Driver{})
}

// The kernel's limit is 500 lower layers. One more is refused before anything is made.
func TestAsManyLayersAsTheKernelTakes(t *testing.T) {
	snapshottest.Root(t)
	snapshottest.Require(t, "overlay", overlayfs.Driver{}.Check(t.Context(), t.TempDir()))
	ctx := t.Context()
	s, err := snapshot.Open(t.TempDir(), overlayfs.Driver{}, snapshot.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return fmt.Sprintf("layer %d", i) }
	parent := ""
	for i := 1; i <= 501; i++ {
		m, err := s.Prepare(ctx, "key", parent, nil)
		if err != nil {
			t.Fatal(err)
		}
		upper := m[0].Source
		for _, o := range m[0].Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = dir
			}
		}
		if err := os.WriteFile(filepath.Join(upper, fmt.Sprint(i)), []byte(name(i)), 0o644); err != nil {
			t.Fatal(err)
		}
		parent = name(i)
		if err := s.Commit(ctx, parent, "key", snapshot.CommitOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for kind, make := range map[string]func() ([]snapshot.Mount, error){
		"prepare": func() ([]snapshot.Mount, error) { return s.Prepare(ctx, "active", name(500), nil) },
		"view":    func() ([]snapshot.Mount, error) { return s.View(ctx, "view", name(500), nil) },
	} {
		if _, err := make(); err != nil {
			t.Fatalf("%s on 500 layers: %v", kind, err)
		}
	}
	for _, key := range []string{"active", "view"} {
		mnt := t.TempDir()
		if err := s.Mount(ctx, key, mnt); err != nil {
			t.Fatal(err)
		}
		names, err := os.ReadDir(mnt)
		if err != nil || len(names) != 500 {
			t.Errorf("%s shows %d files of 500: %v", key, len(names), err)
		}
		if err := snapshot.Unmount(mnt); err != nil {
			t.Error(err)
		}
	}
	_, err = s.Prepare(ctx, "more", name(501), nil)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "500") {
		t.Errorf("501 layers: %v", err)
	}
}

// The suite passes in a user namespace too, where overlayfs's attributes are in user.*.
func TestSuiteInUserNamespace(t *testing.T) {
	snapshottest.Root(t)
	const id = 100000
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, id, id); err != nil {
		t.Fatal(err)
	}
	// This path can be executed even if the user can't reach the binary's directory.
	c := exec.Command("/proc/self/exe", "-test.run=^TestSuite$|^TestRebase$|^TestAsMany|^TestOpaque", "-test.v")
	c.Env = append(os.Environ(), "TMPDIR="+dir, "GOTMPDIR="+dir, "TEST_REQUIRE=root")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 65536}}
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: ids, GidMappings: ids,
		Credential: &syscall.Credential{Uid: 0, Gid: 0},
	}
	out, err := c.CombinedOutput()
	if err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			snapshottest.Require(t, "userns", err)
		}
		t.Fatalf("%v: %s", err, out)
	}
	if strings.Contains(string(out), "--- SKIP") {
		snapshottest.Require(t, "userns", errors.New(string(out)))
	}
}

// A directory that is deleted and made again hides the lower one.
func TestOpaque(t *testing.T) {
	snapshottest.Root(t)
	snapshottest.Require(t, "overlay", overlayfs.Driver{}.Check(t.Context(), t.TempDir()))
	ctx := t.Context()
	s, err := snapshot.Open(t.TempDir(), overlayfs.Driver{}, snapshot.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	dir := filepath.Join(mnt, "dir")
	on := func(key, parent string, f func() error) {
		t.Helper()
		_, err := s.Prepare(ctx, key, parent, nil)
		for _, f := range []func() error{
			func() error { return err },
			func() error { return s.Mount(ctx, key, mnt) }, f, func() error { return snapshot.Unmount(mnt) },
			func() error { return s.Commit(ctx, "done "+key, key, snapshot.CommitOptions{}) },
		} {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}
	}
	on("a", "", func() error { return os.MkdirAll(filepath.Join(dir, "hidden"), 0o755) })
	on("b", "done a", func() error { return errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)) })
	on("c", "done b", func() error {
		names, err := os.ReadDir(dir)
		if err == nil && len(names) > 0 {
			err = fmt.Errorf("still there: %v", names)
		}
		return err
	})
}

// A snapshot prepared without a parent gets one when it is committed.
func TestRebase(t *testing.T) {
	snapshottest.Root(t)
	snapshottest.Require(t, "overlay", overlayfs.Driver{}.Check(t.Context(), t.TempDir()))
	ctx := t.Context()
	s, err := snapshot.Open(t.TempDir(), overlayfs.Driver{}, snapshot.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	for i, key := range []string{"one", "two", "three"} {
		m, err := s.Prepare(ctx, "k"+key, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(m[0].Source, key), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		parent := []string{"", "one", "two"}[i]
		if err := s.Commit(ctx, key, "k"+key, snapshot.CommitOptions{Parent: parent}); err != nil {
			t.Fatal(err)
		}
	}
	if i, err := s.Stat(ctx, "three"); err != nil || i.Parent != "two" {
		t.Errorf("stat three: %+v, %v", i, err)
	}
	if _, err := s.View(ctx, "v", "three", nil); err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	if err := s.Mount(ctx, "v", mnt); err != nil {
		t.Fatal(err)
	}
	defer snapshot.Unmount(mnt)
	if names, err := os.ReadDir(mnt); err != nil || len(names) != 3 {
		t.Errorf("three layers show %v: %v", names, err)
	}
	if err := s.Remove(ctx, "two"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove of what became a parent: %v", err)
	}
}
