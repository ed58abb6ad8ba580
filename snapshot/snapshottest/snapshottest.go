// Package snapshottest is the conformance suite that every snapshot driver must pass, besides containerd's suite in
// testdata/conformance. It tests keys and namespaces, error classes, and that a store stays consistent while many
// processes use it and some are killed.
//
// A driver's test calls [Main] from TestMain and [Run] from a test.
package snapshottest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"distkit/snapshot"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Require skips the test if err says that the machine lacks what. If TEST_REQUIRE, a comma-separated list, names it,
// the test fails instead.
func Require(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil {
		return
	}
	if slices.Contains(strings.Split(os.Getenv("TEST_REQUIRE"), ","), what) {
		t.Fatalf("%s, which TEST_REQUIRE demands: %v", what, err)
	}
	t.Skipf("no %s: %v", what, err)
}

// Strace requires strace, with which tests make system calls fail.
func Strace(t *testing.T) {
	t.Helper()
	err := exec.Command("strace", "-qq", "-o", "/dev/null", "true").Run()
	Require(t, "strace", err)
}

// Root requires root.
func Root(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		Require(t, "root", fmt.Errorf("user ID is %d", os.Geteuid()))
	}
}

// Btrfs puts t.TempDir on a new btrfs, or skips the test. It must be called before t.TempDir.
func Btrfs(t *testing.T) {
	t.Helper()
	mnt := MountBtrfs(t)
	t.Setenv("TMPDIR", mnt)
	t.Setenv("GOTMPDIR", mnt)
}

// MountBtrfs mounts a new btrfs in a file until the test ends, and returns the mount point.
func MountBtrfs(t *testing.T) string {
	t.Helper()
	Root(t)
	dir, err := os.MkdirTemp("", "btrfs-")
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	check(t, os.Mkdir(mnt, 0o755))
	for _, c := range [][]string{
		{"truncate", "-s", "512M", image}, {"mkfs.btrfs", "-q", image}, {"mount", "-o", "loop", image, mnt},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			Require(t, "btrfs", fmt.Errorf("%s: %w: %s", c[0], err, out))
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return mnt
}

// Diff is the Diff option for drivers that make archives.
var Diff snapshot.Diff

// Run runs the suite for a driver, in stores below t.TempDir.
func Run(t *testing.T, d snapshot.Driver) {
	open := func(t *testing.T, root, namespace string) *snapshot.Snapshotter {
		t.Helper()
		s, err := snapshot.Open(root, d, snapshot.Options{Namespace: namespace, NoSync: true, Diff: Diff})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for name, f := range map[string]func(*testing.T, func(*testing.T, string, string) *snapshot.Snapshotter){
		"Life": life, "Errors": errorClasses, "Keys": keys, "Namespaces": namespaces, "Labels": labels, "Mounting": mounting,
	} {
		t.Run(name, func(t *testing.T) { f(t, open) })
	}
	t.Run("Processes", func(t *testing.T) { processes(t, d) })
}

type opener = func(t *testing.T, root, namespace string) *snapshot.Snapshotter

func is(t *testing.T, what string, err error, class func(error) bool, words ...string) {
	t.Helper()
	if !class(err) {
		t.Errorf("%s: wrong class of error: %v", what, err)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

func life(t *testing.T, open opener) {
	Root(t)
	ctx := t.Context()
	root, mnt := t.TempDir(), t.TempDir()
	s := open(t, root, "")
	mounted := func(key string, f func()) {
		t.Helper()
		if err := s.Mount(ctx, key, mnt); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := snapshot.Unmount(mnt); err != nil {
				t.Error(err)
			}
		}()
		f()
	}
	file := func(name string) string { return filepath.Join(mnt, name) }

	must(t)(s.Prepare(ctx, "a", "", nil))
	mounted("a", func() {
		if fi, err := os.Stat(mnt); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("root of a fresh snapshot: %v %v", fi, err)
		}
		check(t, os.WriteFile(file("old"), []byte("old"), 0o640))
		check(t, os.Mkdir(file("dir"), 0o750))
		check(t, os.WriteFile(file("dir/below"), []byte("below"), 0o600))
		check(t, os.Chmod(mnt, 0o711))
		check(t, os.Chown(mnt, 7, 8))
	})
	check(t, s.Commit(ctx, "one", "a", snapshot.CommitOptions{}))
	must(t)(s.Prepare(ctx, "b", "one", nil))
	mounted("b", func() {
		if fi, err := os.Stat(mnt); err != nil || fi.Mode().Perm() != 0o711 {
			t.Errorf("a child's root is not like its parent's: %v %v", fi, err)
		}
		check(t, os.Remove(file("old")))
		check(t, os.RemoveAll(file("dir")))
		check(t, os.WriteFile(file("new"), []byte("new"), 0o644))
	})
	check(t, s.Commit(ctx, "two", "b", snapshot.CommitOptions{}))
	for key, want := range map[string]string{"one": "dir old", "two": "new"} {
		must(t)(s.View(ctx, "v"+key, key, nil))
		mounted("v"+key, func() {
			if got := list(t, mnt); got != want {
				t.Errorf("view of %s holds %q, not %q", key, got, want)
			}
			if err := os.WriteFile(file("x"), nil, 0o644); err == nil {
				t.Error("a view can be written to")
			}
			if fi, err := os.Stat(mnt); err != nil || fi.Mode().Perm() != 0o711 {
				t.Errorf("root of a view: %v %v", fi, err)
			}
		})
	}
	u, err := s.Usage(ctx, "two")
	if err != nil || u.Inodes < 2 || u.Inodes > 4 { // overlayfs has whiteouts in addition
		t.Errorf("usage of a directory and a file: %+v, %v", u, err)
	}
	for _, key := range []string{"vtwo", "vone", "two", "one"} {
		check(t, s.Remove(ctx, key))
	}
	whole(t, root, s)
	if n := len(names(t, filepath.Join(root, "snapshots", s.Driver()))); n > 5 { // one more is allowed to the driver
		t.Errorf("%d names in an emptied store, not keys, sample, state and tmp", n)
	}
}

func list(t *testing.T, dir string) string { return strings.Join(names(t, dir), " ") }

func names(t *testing.T, dir string) []string {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range all {
		out = append(out, e.Name())
	}
	return out
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T) func([]snapshot.Mount, error) {
	return func(m []snapshot.Mount, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if len(m) == 0 {
			t.Fatal("no mounts")
		}
	}
}

func errorClasses(t *testing.T, open opener) {
	ctx := t.Context()
	root := t.TempDir()
	s := open(t, root, "")
	_, err := s.Stat(ctx, "a")
	is(t, "stat in an empty store", err, errdefs.IsNotFound, "stat a")
	if got := names(t, root); len(got) > 0 {
		t.Errorf("reading made %q", got)
	}
	must(t)(s.Prepare(ctx, "a", "", nil))
	must(t)(s.View(ctx, "v", "", nil))
	_, err = s.Prepare(ctx, "a", "", nil)
	is(t, "prepare twice", err, errdefs.IsAlreadyExists, "prepare a")
	_, err = s.View(ctx, "a", "", nil)
	is(t, "view of a taken key", err, errdefs.IsAlreadyExists, "view a")
	_, err = s.Prepare(ctx, "b", "a", nil)
	is(t, "active parent", err, errdefs.IsInvalidArgument, "parent a")
	_, err = s.Prepare(ctx, "b", "none", nil)
	is(t, "no parent", err, errdefs.IsNotFound, "parent none")
	is(t, "commit nothing", s.Commit(ctx, "c", "none", snapshot.CommitOptions{}), errdefs.IsNotFound, "commit c", "none")
	is(t, "commit a view", s.Commit(ctx, "c", "v", snapshot.CommitOptions{}), errdefs.IsInvalidArgument)
	is(t, "remove nothing", s.Remove(ctx, "none"), errdefs.IsNotFound, "remove none")
	check(t, s.Commit(ctx, "c", "a", snapshot.CommitOptions{}))
	_, err = s.Stat(ctx, "a")
	is(t, "stat of what was committed", err, errdefs.IsNotFound)
	is(t, "commit the committed", s.Commit(ctx, "d", "c", snapshot.CommitOptions{}), errdefs.IsInvalidArgument)
	_, err = s.Mounts(ctx, "c")
	is(t, "mounts of the committed", err, errdefs.IsFailedPrecondition)
	must(t)(s.Prepare(ctx, "a", "c", nil))
	is(t, "commit to a taken name", s.Commit(ctx, "c", "a", snapshot.CommitOptions{}), errdefs.IsAlreadyExists)
	if i, err := s.Stat(ctx, "a"); err != nil || i.Kind != snapshot.Active {
		t.Errorf("after a commit that failed: %+v, %v", i, err)
	}
	must(t)(s.View(ctx, "w", "c", nil))
	is(t, "remove a parent", s.Remove(ctx, "c"), errdefs.IsFailedPrecondition, "remove c", "a", "w")
	is(t, "another parent", s.Commit(ctx, "d", "a", snapshot.CommitOptions{Parent: "v"}), errdefs.IsFailedPrecondition)
	whole(t, root, s)

	_, err = snapshot.Open(root, unknown{}, snapshot.Options{Namespace: "a/b"})
	is(t, "bad namespace", err, errdefs.IsInvalidArgument)
	check(t, os.WriteFile(filepath.Join(root, "snapshots", s.Driver(), "state"), []byte("2 x\n"), 0o600))
	_, err = s.Prepare(ctx, "z", "", nil)
	is(t, "later layout", err, errdefs.IsFailedPrecondition, "version")
	root = t.TempDir()
	check(t, os.WriteFile(filepath.Join(root, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o644))
	_, err = snapshot.Open(root, unknown{}, snapshot.Options{})
	is(t, "later image layout", err, errdefs.IsFailedPrecondition, "version")
}

type unknown struct{ snapshot.Driver }

func (unknown) Name() string { return "unknown" }

func keys(t *testing.T, open opener) {
	ctx := t.Context()
	root := t.TempDir()
	s := open(t, root, "")
	good := []string{"a", ".", "..", "../../etc", "/", "-", " ", "tab\tbed", "\x1b[1m", "ünï", "1", "state", strings.Repeat("k", 4096)}
	for _, key := range good {
		must(t)(s.Prepare(ctx, key, "", nil))
		if i, err := s.Stat(ctx, key); err != nil || i.Key != key {
			t.Errorf("stat %q: %+v, %v", key, i, err)
		}
	}
	for _, key := range []string{"", "a\x00b", "a\nb", "\xff", strings.Repeat("k", 4097)} {
		_, err := s.Prepare(ctx, key, "", nil)
		is(t, fmt.Sprintf("prepare %.20q", key), err, errdefs.IsInvalidArgument)
		is(t, fmt.Sprintf("commit %.20q", key), s.Commit(ctx, key, "a", snapshot.CommitOptions{}), errdefs.IsInvalidArgument)
	}
	var found []string
	check(t, s.Walk(ctx, func(_ context.Context, i snapshot.Info) error {
		found = append(found, i.Key)
		return nil
	}))
	slices.Sort(found)
	slices.Sort(good)
	if !slices.Equal(found, good) {
		t.Errorf("walk found %q", found)
	}
	for _, name := range names(t, filepath.Join(root, "snapshots", s.Driver())) {
		if _, err := strconv.Atoi(name); err != nil && !slices.Contains([]string{"keys", "sample", "state", "tmp", "userxattr"}, name) {
			t.Errorf("a key became a name: %q", name)
		}
	}
	whole(t, root, s)
}

func namespaces(t *testing.T, open opener) {
	ctx := t.Context()
	root := t.TempDir()
	one, two := open(t, root, "one"), open(t, root, "two")
	digest := "sha256:" + strings.Repeat("a", 64)
	must(t)(one.Prepare(ctx, "k", "", nil))
	must(t)(two.Prepare(ctx, "k", "", nil))
	check(t, one.Commit(ctx, digest, "k", snapshot.CommitOptions{}))
	_, err := one.Stat(ctx, "k")
	is(t, "own key after commit", err, errdefs.IsNotFound)
	if i, err := two.Stat(ctx, digest); err != nil || i.Kind != snapshot.Committed {
		t.Errorf("digest in the other namespace: %+v, %v", i, err)
	}
	is(t, "digest twice", two.Commit(ctx, digest, "k", snapshot.CommitOptions{}), errdefs.IsAlreadyExists)
	must(t)(one.Prepare(ctx, "other", "", nil))
	other := "sha256:" + strings.Repeat("b", 64)
	must(t)(one.Prepare(ctx, other, "", nil))
	must(t)(two.Prepare(ctx, other, "", nil))
	check(t, one.Commit(ctx, other, other, snapshot.CommitOptions{}))
	is(t, "digest in place, twice", two.Commit(ctx, other, other, snapshot.CommitOptions{}), errdefs.IsAlreadyExists)
	must(t)(two.Prepare(ctx, "of other", other, nil))
	check(t, two.Remove(ctx, "of other"))
	check(t, two.Remove(ctx, other))
	check(t, two.Remove(ctx, other))
	check(t, one.Remove(ctx, "other"))
	check(t, two.Commit(ctx, "named", "k", snapshot.CommitOptions{}))
	_, err = one.Stat(ctx, "named")
	is(t, "another's name", err, errdefs.IsNotFound)
	_, err = one.Prepare(ctx, "x", "named", nil)
	is(t, "another's parent", err, errdefs.IsNotFound)
	must(t)(two.Prepare(ctx, "child", digest, nil))
	is(t, "remove what another namespace uses", one.Remove(ctx, digest), errdefs.IsFailedPrecondition, "child", "two")
	count := func(s *snapshot.Snapshotter) (n int) {
		check(t, s.Walk(ctx, func(context.Context, snapshot.Info) error { n++; return nil }))
		return n
	}
	if a, b := count(one), count(two); a != 1 || b != 3 {
		t.Errorf("the namespaces see %d and %d snapshots, not 1 and 3", a, b)
	}
	check(t, two.Remove(ctx, "child"))
	check(t, one.Remove(ctx, digest))
	whole(t, root, one)
}

func labels(t *testing.T, open opener) {
	ctx := t.Context()
	s := open(t, t.TempDir(), "")
	must(t)(s.Prepare(ctx, "a", "", map[string]string{"x": "1", "y": "2"}))
	i, err := s.Update(ctx, snapshot.Info{Key: "a", Labels: map[string]string{"x": "3", "z": "4"}}, "labels.x", "labels.y")
	check(t, err)
	if got := fmt.Sprint(i.Labels); got != "map[x:3]" || !i.Updated.After(i.Created) {
		t.Errorf("after updating x and y: %s, %+v", got, i)
	}
	i, err = s.Update(ctx, snapshot.Info{Key: "a", Labels: map[string]string{"z": "4"}})
	if got := fmt.Sprint(i.Labels); err != nil || got != "map[z:4]" {
		t.Errorf("after replacing them: %s, %v", got, err)
	}
	_, err = s.Update(ctx, snapshot.Info{Key: "a"}, "parent")
	is(t, "update of parent", err, errdefs.IsInvalidArgument)
	_, err = s.Prepare(ctx, "b", "", map[string]string{"x": strings.Repeat("v", 4096)})
	is(t, "long label", err, errdefs.IsInvalidArgument)
	check(t, s.Commit(ctx, "c", "a", snapshot.CommitOptions{Labels: map[string]string{"l": "5"}}))
	if i, err := s.Stat(ctx, "c"); err != nil || fmt.Sprint(i.Labels) != "map[l:5]" {
		t.Errorf("labels of a commit: %+v, %v", i, err)
	}
}

func mounting(t *testing.T, open opener) {
	Root(t)
	for name, dir := range map[string]string{
		// The path contains all characters that have a meaning in mount options.
		"Syntax": `a,b:c\d e`,
		// fsconfig(2) takes 255 bytes.
		"Long": strings.Repeat("x", 200) + "/" + strings.Repeat("y", 200),
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), dir)
			check(t, os.MkdirAll(root, 0o755))
			mountingIn(t, open, root)
		})
	}
}

func mountingIn(t *testing.T, open opener, root string) {
	ctx := t.Context()
	s := open(t, root, "")
	mnt := filepath.Join(t.TempDir(), "m n")
	check(t, os.Mkdir(mnt, 0o755))
	check(t, snapshot.Unmount(mnt))
	must(t)(s.Prepare(ctx, "a", "", nil))
	check(t, s.Commit(ctx, "c1", "a", snapshot.CommitOptions{}))
	for _, key := range []string{"active", "view", "shallow"} {
		parent := "c2"
		if key == "shallow" {
			parent = "c1"
		} else {
			must(t)(s.Prepare(ctx, "a", "c1", nil))
			check(t, s.Commit(ctx, parent, "a", snapshot.CommitOptions{}))
		}
		if key == "active" {
			must(t)(s.Prepare(ctx, key, parent, nil))
		} else {
			must(t)(s.View(ctx, key, parent, nil))
		}
		check(t, s.Mount(ctx, key, mnt))
		check(t, s.Mount(ctx, key, mnt))
		if n := mountedOn(t, mnt); n != 1 {
			t.Errorf("%s is mounted %d times after two calls", key, n)
		}
		// A view's programs must not run with their owner's rights. An active snapshot may be a container's, and needs
		// set-user-ID programs.
		if suid, dev := mountedWith(t, mnt); suid != (key == "active") || dev != (key == "active") {
			t.Errorf("%s: set-user-ID bits count: %v, devices open: %v", key, suid, dev)
		}
		if key == "active" {
			is(t, "mount it again without", s.MountWith(ctx, key, mnt, snapshot.MountOptions{NoSuid: true}), errdefs.IsUnavailable, "nosuid")
			is(t, "commit the mounted", s.Commit(ctx, "c", key, snapshot.CommitOptions{}), errdefs.IsUnavailable, mnt)
		}
		err := s.Remove(ctx, key)
		if err == nil && key != "active" {
			// For some drivers the parent's directory is what is mounted.
			err = s.Remove(ctx, parent)
		}
		is(t, "remove the mounted "+key, err, errdefs.IsUnavailable, mnt)
		if key == "active" {
			must(t)(s.Prepare(ctx, "other", parent, nil))
			is(t, "mount another", s.Mount(ctx, "other", mnt), errdefs.IsUnavailable)
			check(t, s.Remove(ctx, "other"))
		}
		if key == "active" {
			// The error must name what to do first: removing the child.
			is(t, "remove the parent of the mounted", s.Remove(ctx, parent), errdefs.IsFailedPrecondition, "children", key)
		}
		check(t, snapshot.Unmount(mnt))
		check(t, snapshot.Unmount(mnt))
		if n := mountedOn(t, mnt); n != 0 {
			t.Errorf("%s is mounted %d times after umount", key, n)
		}
		if err := s.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		check(t, s.Remove(ctx, parent))
	}
	must(t)(s.Prepare(ctx, "other", "", nil))
	is(t, "mount on nothing", s.Mount(ctx, "other", filepath.Join(mnt, "none")), errdefs.IsNotFound)
	check(t, s.Commit(ctx, "c", "other", snapshot.CommitOptions{}))
	is(t, "mount the committed", s.Mount(ctx, "c", mnt), errdefs.IsFailedPrecondition)
	is(t, "unmount what is no snapshot", snapshot.Unmount("/proc"), errdefs.IsFailedPrecondition)
}

// mountedWith reports whether set-user-ID bits and devices work in the mount on dir.
func mountedWith(t *testing.T, dir string) (suid, dev bool) {
	t.Helper()
	var st unix.Statfs_t
	check(t, unix.Statfs(dir, &st))
	return st.Flags&unix.ST_NOSUID == 0, st.Flags&unix.ST_NODEV == 0
}

func mountedOn(t *testing.T, dir string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == strings.ReplaceAll(dir, " ", `\040`) {
			n++
		}
	}
	return n
}

// whole checks that a store holds only complete snapshots that can be found by their keys, after a call has swept what
// killed processes have left.
func whole(t *testing.T, root string, s *snapshot.Snapshotter) {
	t.Helper()
	ctx := context.Background()
	must(t)(s.Prepare(ctx, "whole", "", nil))
	check(t, s.Remove(ctx, "whole"))
	if left := names(t, filepath.Join(root, "snapshots", s.Driver(), "tmp")); len(left) > 0 {
		t.Errorf("left in tmp: %q", left)
	}
	dirs := map[string]bool{}
	for _, n := range names(t, filepath.Join(root, "snapshots", s.Driver())) {
		if _, err := strconv.Atoi(n); err == nil {
			dirs[n] = true
			for _, f := range []string{"info", "fs"} {
				if _, err := os.Stat(filepath.Join(root, "snapshots", s.Driver(), n, f)); err != nil {
					t.Errorf("snapshot %s is not complete: %v", n, err)
				}
			}
		}
	}
	for _, k := range names(t, filepath.Join(root, "snapshots", s.Driver(), "keys")) {
		to, err := os.Readlink(filepath.Join(root, "snapshots", s.Driver(), "keys", k))
		check(t, err)
		delete(dirs, filepath.Base(to))
	}
	if len(dirs) > 0 {
		t.Errorf("no key leads to %v", dirs)
	}
	check(t, s.Walk(ctx, func(_ context.Context, i snapshot.Info) error {
		if got, err := s.Stat(ctx, i.Key); err != nil || got.Kind != i.Kind || got.Parent != i.Parent {
			t.Errorf("stat %s: %+v, %v; walk found %+v", i.Key, got, err, i)
		}
		if i.Parent != "" {
			if p, err := s.Stat(ctx, i.Parent); err != nil || p.Kind != snapshot.Committed {
				t.Errorf("%s has parent %s: %+v, %v", i.Key, i.Parent, p, err)
			}
		}
		return nil
	}))
}

const workerEnv = "SNAPSHOTTEST_WORKER"

// Main runs the tests of a test binary, or the worker that a test has started it as.
func Main(m *testing.M, d snapshot.Driver) {
	if root := os.Getenv(workerEnv); root != "" {
		if err := work(root, d); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// processes starts workers that change a few keys at random, and kills some of them.
func processes(t *testing.T, d snapshot.Driver) {
	root := t.TempDir()
	s, err := snapshot.Open(root, d, snapshot.Options{NoSync: true, Diff: Diff})
	check(t, err)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for round := range 4 {
				c := exec.Command(os.Args[0])
				c.Env = append(os.Environ(), workerEnv+"="+root)
				out, err := c.StdoutPipe()
				check(t, err)
				check(t, c.Start())
				b := make([]byte, 1<<16)
				total := ""
				kill := i%2 == 0 && round < 3
				stop := 1 + rand.IntN(200)
				for {
					n, err := out.Read(b)
					total += string(b[:n])
					if kill && len(total) >= stop {
						_ = c.Process.Kill()
					}
					if err != nil {
						break
					}
				}
				if err := c.Wait(); err != nil && !kill {
					t.Errorf("worker: %v: %s", err, strings.TrimLeft(total, "."))
				}
			}
		})
	}
	wg.Wait()
	whole(t, root, s)
}

// work prints a dot for each change that it makes to the store.
func work(root string, d snapshot.Driver) error {
	ctx := context.Background()
	for range 60 {
		s, err := snapshot.Open(root, d, snapshot.Options{NoSync: true, Diff: Diff})
		if err != nil {
			return err
		}
		key, name := fmt.Sprintf("k%d", rand.IntN(5)), fmt.Sprintf("n%d", rand.IntN(5))
		switch rand.IntN(6) {
		case 0:
			_, err = s.Prepare(ctx, key, "", nil)
		case 1:
			var m []snapshot.Mount
			if m, err = s.Prepare(ctx, key, name, nil); err == nil && m[0].Type == "bind" {
				err = os.WriteFile(filepath.Join(m[0].Source, name), []byte(key), 0o644)
				if errors.Is(err, fs.ErrNotExist) {
					err = nil // removed by another worker
				}
			}
		case 2:
			err = s.Commit(ctx, name, key, snapshot.CommitOptions{})
		case 3:
			err = s.Remove(ctx, key)
		case 4:
			err = s.Remove(ctx, name)
		case 5:
			_, err = s.Update(ctx, snapshot.Info{Key: key, Labels: map[string]string{"by": strconv.Itoa(os.Getpid())}})
		}
		switch {
		case err == nil, errdefs.IsNotFound(err), errdefs.IsAlreadyExists(err), errdefs.IsFailedPrecondition(err),
			errdefs.IsInvalidArgument(err), errdefs.IsUnavailable(err):
		default:
			return err
		}
		if _, err := os.Stdout.WriteString("."); err != nil {
			return err
		}
	}
	return nil
}
