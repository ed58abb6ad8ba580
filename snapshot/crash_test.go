package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/btrfs"
	"distkit/snapshot/native"
	"distkit/snapshot/overlayfs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
)

const (
	crashEnv = "SNAPSHOT_CRASH"    // value: scenario and driver
	stepEnv  = "SNAPSHOT_CRASH_AT" // value: the step to be killed at, counted from 1
	rootEnv  = "SNAPSHOT_CRASH_ROOT"
)

var drivers = map[string]snapshot.Driver{"native": dying{native.Driver{}}, "overlayfs": dying{overlayfs.Driver{}}, "btrfs": dying{btrfs.Driver{}}}

// dying is a driver that can be killed in the middle of its own work, too.
type dying struct{ snapshot.Driver }

var at = func(string) {}

func (d dying) Create(ctx context.Context, t snapshot.Tree) error {
	at("create begins")
	return d.Driver.Create(ctx, t)
}

func (d dying) Settle(ctx context.Context, t snapshot.Tree, r io.Reader) error {
	at("driver settles")
	err := d.Driver.Settle(ctx, t, r)
	at("driver has settled")
	return err
}

func (d dying) Remove(ctx context.Context, dir string) error {
	at("remove begins")
	if err := d.Driver.Remove(ctx, filepath.Join(dir, "fs")); err != nil {
		return err
	}
	at("remove amid")
	return d.Driver.Remove(ctx, dir)
}

// A scenario changes a store that has a committed snapshot "base" and its active child "active". Whenever it is killed,
// the store must be in the state before or after the change.
var scenarios = map[string]struct {
	do            func(context.Context, *snapshot.Snapshotter) error
	before, after string
	between       []string // what else may exist, or exist instead, after a kill in between
}{
	"prepare": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		_, err := s.Prepare(ctx, "new", "base", nil)
		return err
	}, "active:Active:base base:Committed:", "active:Active:base base:Committed: new:Active:base", nil},
	"commit": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		return s.Commit(ctx, "done", "active", snapshot.CommitOptions{})
	}, "active:Active:base base:Committed:", "base:Committed: done:Committed:base", nil},
	"commit in place": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		return s.Commit(ctx, "active", "active", snapshot.CommitOptions{})
	}, "active:Active:base base:Committed:", "active:Committed:base base:Committed:", nil},
	"remove": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		return s.Remove(ctx, "active")
	}, "active:Active:base base:Committed:", "base:Committed:", nil},
	"update": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		_, err := s.Update(ctx, snapshot.Info{Key: "active", Labels: map[string]string{"l": "v"}})
		return err
	}, "active:Active:base base:Committed:", "active:Active:base:l base:Committed:", nil},
	"another boot": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		return s.Remove(ctx, "active")
	}, "active:Active:base base:Committed:", "base:Committed:", nil},
	"settle": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		if _, err := s.Stat(ctx, "done"); err == nil {
			return nil
		}
		if err := s.Remove(ctx, "alone"); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		m, err := s.Prepare(ctx, "alone", "", nil)
		if err != nil {
			return err
		}
		if err := fill(m[0].Source); err != nil {
			return err
		}
		return s.Commit(ctx, "done", "alone", snapshot.CommitOptions{Parent: "base", Settle: strings.NewReader(unresolved)})
	}, "active:Active:base base:Committed:", "active:Active:base base:Committed: done:Committed:base", []string{"alone:Active:"}},
	"stack": {func(ctx context.Context, s *snapshot.Snapshotter) error {
		apply := func(_ context.Context, p snapshot.Place) error {
			at("apply begins")
			if p.File != nil {
				return errors.New("applied again")
			}
			if err := fill(p.Dir); err != nil {
				return err
			}
			at("apply ends")
			if p.Unresolved != "" {
				return os.WriteFile(p.Unresolved, []byte(unresolved), 0o600)
			}
			return nil
		}
		return s.Stack(ctx, "base", []snapshot.Layer{{Name: "one", Apply: apply}, {Name: "two", Apply: apply}}, 2, func(string) error { return nil })
	}, "active:Active:base base:Committed:", "active:Active:base base:Committed: one:Committed:base two:Committed:one", []string{
		"one:Committed:base", "stack_one:Active:", "stack_two:Active:",
	}},
}

// unresolved is the output of dist-apply --unresolved for a layer with the file dir/file and a link to base's file: it
// does not know what the lower layers have at dir.
const unresolved = "directory\x00.\x00\x00directory\x00dir\x00\x00link\x00link\x00file\x00"

// fill makes these files, unless they exist.
func fill(dir string) error {
	if err := os.Mkdir(filepath.Join(dir, "dir"), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syscall.Mknod(filepath.Join(dir, "link"), syscall.S_IFSOCK|0o600, 0); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "dir/file"), nil, 0o644)
}

func TestMain(m *testing.M) {
	if scenario := os.Getenv(crashEnv); scenario != "" {
		os.Exit(crash(scenario))
	}
	os.Exit(m.Run())
}

// crash runs a scenario, and is killed at the step that the environment names.
func crash(scenario string) int {
	die, _ := strconv.Atoi(os.Getenv(stepEnv))
	n := 0
	var one sync.Mutex
	at = func(name string) {
		one.Lock()
		defer one.Unlock()
		if n++; n == die {
			fmt.Println(name)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	snapshot.OnStep(at)
	name, driver, _ := strings.Cut(scenario, "/")
	s, err := snapshot.Open(os.Getenv(rootEnv), drivers[driver], snapshot.Options{})
	if err == nil {
		err = scenarios[name].do(context.Background(), s)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func TestKilledAtEveryStep(t *testing.T) {
	for driver, d := range drivers {
		for name, sc := range scenarios {
			t.Run(driver+"/"+name, func(t *testing.T) {
				onItsFilesystem(t, d)
				switch overlay := driver == overlayfs.Name; {
				case name == "settle" && !overlay:
					return // already done by others
				case (name == "settle" || name == "stack") && overlay:
					snapshottest.Root(t)
				}
				for n := 1; ; n++ {
					if n > 150 {
						t.Fatal("no end of steps")
					}
					if !killAt(t, d, name, sc.before, sc.after, n) {
						if n < 4 {
							t.Errorf("only %d steps", n-1)
						}
						return
					}
				}
			})
		}
	}
}

// killAt runs a scenario and reports whether it was killed at step n.
func killAt(t *testing.T, d snapshot.Driver, name, before, after string, n int) bool {
	t.Helper()
	ctx := t.Context()
	root := t.TempDir()
	s := open(t, root, d)
	for _, err := range []error{
		prepare(s, "active", ""),
		os.WriteFile(filepath.Join(root, "snapshots", d.Name(), "1/fs/file"), []byte("content"), 0o644),
		s.Commit(ctx, "base", "active", snapshot.CommitOptions{}),
		prepare(s, "active", "base"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if name == "another boot" {
		otherBoot(t, root, d)
	}
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), crashEnv+"="+name+"/"+d.Name(), rootEnv+"="+root, stepEnv+"="+strconv.Itoa(n))
	out, err := c.CombinedOutput()
	died := err != nil
	where := strings.TrimSpace(string(out))
	if ws := c.ProcessState.Sys().(syscall.WaitStatus); died && (!ws.Signaled() || ws.Signal() != syscall.SIGKILL) {
		t.Fatalf("%v: %s", err, where)
	}

	state := describe(t, open(t, root, d))
	if state != before && state != after && !isBetween(state, before, scenarios[name].between) || !died && state != after {
		t.Errorf("killed at %q: %q", where, state)
	}
	// A second run must succeed, or report that the change has been made.
	err = scenarios[name].do(ctx, open(t, root, d))
	if err != nil && (state != after || !errdefs.IsAlreadyExists(err) && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err)) {
		t.Errorf("killed at %q, then: %v", where, err)
	}
	if got := describe(t, s); got != after {
		t.Errorf("killed at %q, then done again: %q", where, got)
	}
	// Every call that makes or removes something also sweeps.
	if err := prepare(s, "sweep", ""); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Join(root, "snapshots", d.Name(), "tmp"))
	if err != nil || len(left) > 0 {
		t.Errorf("killed at %q: left in tmp: %v, %v", where, left, err)
	}
	if err := s.Sweep(ctx, snapshot.Sweep{Alone: func(f func(func(string, snapshot.Info) bool) error) error {
		return f(func(string, snapshot.Info) bool { return false })
	}}, func(snapshot.Info, snapshot.Usage) error { return nil }); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Join(root, "snapshots", d.Name(), "locks")); len(left) > 0 {
		t.Errorf("killed at %q: left in locks: %v", where, left)
	}
	return died
}

// isBetween reports whether a state is the one before, with some of others in addition.
func isBetween(state, before string, others []string) bool {
	left := strings.Fields(before)
	for _, item := range strings.Fields(strings.ReplaceAll(state, "stack ", "stack_")) {
		if i := slices.Index(left, item); i >= 0 {
			left = slices.Delete(left, i, i+1)
		} else if !slices.ContainsFunc(others, func(o string) bool { return strings.HasPrefix(item, o) }) {
			return false
		} else if strings.HasPrefix(item, "stack_") && !strings.HasSuffix(item, ":"+snapshot.TemporaryLabel) {
			return false
		}
	}
	return len(left) == 0
}

func onItsFilesystem(t *testing.T, d snapshot.Driver) {
	if d.Name() == btrfs.Name {
		snapshottest.Btrfs(t)
	}
}

func open(t *testing.T, root string, d snapshot.Driver) *snapshot.Snapshotter {
	t.Helper()
	s, err := snapshot.Open(root, d, snapshot.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func prepare(s *snapshot.Snapshotter, key, parent string) error {
	_, err := s.Prepare(context.Background(), key, parent, nil)
	return err
}

// describe returns a store as one line: key, kind, parent and labels of each snapshot, and whether its files exist.
func describe(t *testing.T, s *snapshot.Snapshotter) string {
	t.Helper()
	var all []string
	if err := s.Walk(t.Context(), func(ctx context.Context, i snapshot.Info) error {
		line := fmt.Sprintf("%s:%s:%s", i.Key, i.Kind, i.Parent)
		for l := range i.Labels {
			line += ":" + l
		}
		if u, err := s.Usage(ctx, i.Key); err != nil || u.Inodes == 0 {
			line += fmt.Sprintf(" (usage %+v, %v)", u, err)
		}
		all = append(all, line)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// otherBoot changes a store as a power failure may: the boot ID is another one, and the index is missing or wrong.
func otherBoot(t *testing.T, root string, d snapshot.Driver) {
	t.Helper()
	dir := filepath.Join(root, "snapshots", d.Name())
	keys, err := filepath.Glob(filepath.Join(dir, "keys/*"))
	if err != nil || len(keys) != 2 {
		t.Fatalf("%d keys: %v", len(keys), err)
	}
	for _, err := range []error{
		os.WriteFile(filepath.Join(dir, "state"), []byte("1 another-boot 1\n"), 0o600),
		os.Remove(keys[0]),
		os.Remove(keys[1]),
		os.Symlink("../77", keys[1]),
		os.Symlink("../1", filepath.Join(dir, "keys", strings.Repeat("0", 64))),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// After a power failure, a snapshot without a record is removed. The others are kept.
func TestTornRecord(t *testing.T) {
	for name, d := range drivers {
		for torn, content := range map[string]string{"empty": "", "half": `{"key":"act`, "zeroes": strings.Repeat("\x00", 100)} {
			t.Run(name+"/"+torn, func(t *testing.T) {
				onItsFilesystem(t, d)
				root := t.TempDir()
				s := open(t, root, d)
				if err := prepare(s, "a", ""); err != nil {
					t.Fatal(err)
				}
				if err := prepare(s, "b", ""); err != nil {
					t.Fatal(err)
				}
				dir := filepath.Join(root, "snapshots", d.Name())
				if err := os.WriteFile(filepath.Join(dir, "2/info"), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Stat(t.Context(), "b"); !errdefs.IsDataLoss(err) {
					t.Errorf("stat with a torn record: %v", err)
				}
				if err := os.WriteFile(filepath.Join(dir, "state"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				s = open(t, root, d)
				if got := describe(t, s); got != "a:Active:" {
					t.Errorf("after a boot: %q", got)
				}
				if err := prepare(s, "b", ""); err != nil {
					t.Error(err)
				}
				if _, err := os.Stat(filepath.Join(dir, "2")); err == nil {
					t.Error("id 2 was used again")
				} else if _, err := os.Stat(filepath.Join(dir, "3/fs")); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// Only the owner may enter the directories of snapshots, because root filesystems contain set-user-ID programs.
func TestPrivate(t *testing.T) {
	root := t.TempDir()
	s := open(t, root, drivers["native"])
	if err := prepare(s, "a", ""); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(filepath.Join(root, "snapshots/native"))
	if err != nil || fi.Mode() != fs.ModeDir|0o700 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
}

// A parent can't be removed while a snapshot is prepared from it, or committed on top of it.
func TestParentIsHeld(t *testing.T) {
	ctx := t.Context()
	root := t.TempDir()
	s := open(t, root, drivers["overlayfs"])
	for _, err := range []error{
		prepare(s, "a", ""), s.Commit(ctx, "base", "a", snapshot.CommitOptions{}), prepare(s, "alone", ""),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	remove := func(at string) func(string) {
		return func(name string) {
			if name == at {
				snapshot.OnStep(func(string) {})
				err = s.Remove(ctx, "base")
			}
		}
	}
	defer snapshot.OnStep(func(string) {})
	snapshot.OnStep(remove("filled"))
	if err := prepare(s, "child", "base"); err != nil {
		t.Error(err)
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("remove of a parent while a child is prepared: %v", err)
	}
	if err := s.Remove(ctx, "child"); err != nil {
		t.Fatal(err)
	}
	snapshot.OnStep(remove("synced"))
	if err := s.Commit(ctx, "top", "alone", snapshot.CommitOptions{Parent: "base"}); err != nil {
		t.Error(err)
	}
	if !errdefs.IsUnavailable(err) {
		t.Errorf("remove of a parent while a snapshot is committed on it: %v", err)
	}
}
