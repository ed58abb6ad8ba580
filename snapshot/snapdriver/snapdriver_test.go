package snapdriver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"distkit/errclass"
	"distkit/snapshot"
	"distkit/snapshot/overlayfs"
	"distkit/snapshot/snapdriver"
	"distkit/snapshot/snapshottest"

	"golang.org/x/sys/unix"
)

// driverEnv is the environment variable with the driver for a worker of the suite.
const driverEnv = "SNAPDRIVER_TEST_DRIVER"

func TestMain(m *testing.M) {
	var dirs []string
	for _, dir := range []string{"../../scripts", "testdata"} {
		abs, err := filepath.Abs(dir)
		if err != nil {
			panic(err)
		}
		dirs = append(dirs, abs)
	}
	os.Setenv("PATH", strings.Join(dirs, ":")+":"+os.Getenv("PATH"))
	var d snapdriver.Driver
	if name := os.Getenv(driverEnv); name != "" {
		var err error
		if d, err = snapdriver.Open(context.Background(), name); err != nil {
			panic(err)
		}
	}
	snapshottest.Main(m, d)
}

func driver(t *testing.T, name string) snapdriver.Driver {
	t.Helper()
	d, err := snapdriver.Open(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestSuite(t *testing.T) {
	t.Setenv(driverEnv, "cp")
	snapshottest.Run(t, driver(t, "cp"))
}

func TestSuiteOfLayers(t *testing.T) {
	snapshottest.Root(t)
	snapshottest.Require(t, "overlay", overlayfs.Driver{}.Check(t.Context(), t.TempDir()))
	t.Setenv(driverEnv, "layer")
	snapshottest.Run(t, driver(t, "layer"))
}

// The conformance script accepts our example driver, and rejects drivers that break the protocol.
func TestConformance(t *testing.T) {
	script := func(name string, env ...string) (string, error) {
		c := exec.Command("snap-check-driver", "--in", t.TempDir(), name)
		c.Env = append(os.Environ(), env...)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	for _, name := range []string{"cp", "layer"} {
		if out, err := script(name); err != nil || strings.Contains(out, "not ok") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
	if out, err := script("bad", "BAD_VERB=usage", "BAD="+scriptOf(t, "echo 0 0")); err == nil || !strings.Contains(out, "not ok") {
		t.Errorf("a driver with empty children passes: %v\n%s", err, out)
	}
	for verb, bad := range map[string]string{
		"form":   "echo of none",
		"check":  "echo talks",
		"create": `mkdir "$2/fs"; if [[ $# -gt 2 ]]; then cp -al "$3/fs/." "$2/fs"; fi`,
		"remove": "echo fails >&2; exit 1",
		"usage":  "echo -1 x",
	} {
		out, err := script("bad", "BAD_VERB="+verb, "BAD="+scriptOf(t, bad))
		if err == nil || !strings.Contains(out, "not ok") {
			t.Errorf("%s: %s: %v\n%s", verb, bad, err, out)
		}
	}
}

// The conformance script deletes nothing through a mount that a driver has made.
func TestConformanceOfMounts(t *testing.T) {
	snapshottest.Root(t)
	for verb, what := range map[string]string{
		"create": `mkdir "$2/fs"; mount --bind "$OUTSIDE" "$2/fs"`,
		"usage":  `mkdir 1/fs/deep; mount --bind "$OUTSIDE" 1/fs/deep; echo 0 0`,
		"remove": `mount --bind "$OUTSIDE" "$2"`,
	} {
		t.Run(verb, func(t *testing.T) {
			outside, in := t.TempDir(), t.TempDir()
			precious := filepath.Join(outside, "precious")
			if err := os.WriteFile(precious, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				for _, pattern := range []string{"tmp/*", "tmp/*/fs", "1/fs/deep"} {
					mounts, _ := filepath.Glob(filepath.Join(in, "*/snapshots/bad", pattern))
					for _, m := range mounts {
						_ = unix.Unmount(m, unix.MNT_DETACH)
					}
				}
			})
			c := exec.Command("snap-check-driver", "--in", in, "bad")
			c.Env = append(os.Environ(), "BAD_VERB="+verb, "BAD="+scriptOf(t, what), "OUTSIDE="+outside)
			out, err := c.CombinedOutput()
			if c.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "Bail out! "+verb+" has left a mount in "+in) {
				t.Errorf("%v\n%s", err, out)
			}
			if _, err := os.Stat(precious); err != nil {
				t.Errorf("the script has deleted files through a mount: %v\n%s", err, out)
			}
		})
	}
}

// The example driver reports a failure in one line, and the cp that it has started is killed with it.
func TestCp(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"1/fs", "tmp/2/fs/fs/a", "tmp/2/fs/fs/b"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, "1/fs", name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	create := func() (*exec.Cmd, *strings.Builder) {
		var said strings.Builder
		c := exec.Command("snap-driver-cp", "create", "tmp/2", "1")
		c.Dir, c.Stderr = dir, &said
		return c, &said
	}
	c, said := create()
	if _ = c.Run(); c.ProcessState.ExitCode() != 1 || strings.Count(said.String(), "\n") != 1 || !strings.Contains(said.String(), "directory") {
		t.Errorf("%v: %q", c.ProcessState, said)
	}

	bin, mark := t.TempDir(), filepath.Join(t.TempDir(), "mark")
	hang := "#!/bin/sh\necho one >&2; echo two >&2; echo $$ >'" + mark + ".new'; mv '" + mark + ".new' '" + mark + "'; exec sleep 100\n"
	if err := os.WriteFile(filepath.Join(bin, "cp"), []byte(hang), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	c, _ = create()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pid := begun(t, mark)[0]
	if err := c.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err == nil || alive(pid) {
		t.Errorf("%v; cp is alive: %v", err, alive(pid))
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// scriptOf returns a file with a script.
func scriptOf(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// bad returns a snapshotter whose driver breaks the protocol in one verb.
func bad(t *testing.T, verb, what string) (*snapshot.Snapshotter, string, error) {
	t.Helper()
	t.Setenv("BAD_VERB", verb)
	t.Setenv("BAD", scriptOf(t, what))
	d, err := snapdriver.Open(t.Context(), "bad")
	if err != nil {
		return nil, "", err
	}
	root := t.TempDir()
	s, err := snapshot.Open(root, d, snapshot.Options{NoSync: true})
	return s, filepath.Join(root, "snapshots/bad"), err
}

// left lists what a store has besides the files that every store has.
func left(t *testing.T, dir string) string {
	t.Helper()
	var out []string
	for _, pattern := range []string{"[0-9]*", "tmp/*", "keys/*"} {
		names, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, names...)
	}
	return strings.Join(out, " ")
}

// If a driver prints or makes something invalid, the snapshot is not made and nothing is left of it.
func TestHostileCreate(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		form, what string
		status     int
		words      string
	}{
		{"tree", `:`, 4, "made no snapshot"},
		{"tree", `ln -s ` + outside + ` "$2/fs"`, 4, "made no snapshot"},
		{"tree", `touch "$2/fs"`, 4, "made no snapshot"},
		{"tree", `mkfifo "$2/fs"`, 4, "made no snapshot"},
		{"tree", `rmdir "$2"; ln -s ` + outside + ` "$2"`, 4, "made no snapshot"},
		{"tree", `mkdir "$2/fs"; echo talks`, 4, "printed something"},
		{"tree", `mkdir "$2/fs"; exec yes`, 4, "printed more than"},
		{"tree", `mkdir "$2/fs"; exec head -c 100000 /dev/urandom`, 4, "printed more than"},
		{"tree", `mkdir "$2/fs"; ln -s ` + outside + `/x "$2/info"`, 8, "symbolic link"},
		{"tree", `mkdir "$2/fs"; touch "$2/fs/half"; printf 'one\nno room\033[2J\377\n' >&2; exit 6`, 6, `no room\x1b[2J`},
		{"tree", `mkdir "$2/fs"; kill -9 $$`, 1, "signal: killed"},
		{"tree", `exit 255`, 1, "exit status 255"},
		{"layer", `mkdir "$2/fs"`, 4, "made no snapshot"},
		{"layer", `mkdir "$2/fs"; ln -s ` + outside + ` "$2/work"`, 4, "made no snapshot"},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Setenv("FORM", c.form)
			s, dir, err := bad(t, "create", c.what)
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Prepare(t.Context(), "k", "", nil)
			if got := errclass.Status(err); got != c.status || !strings.Contains(fmt.Sprint(err), c.words) || strings.ContainsAny(err.Error(), "\x1b\n") || !utf8.ValidString(err.Error()) {
				t.Errorf("status %d, not %d with %q: %q", got, c.status, c.words, err)
			}
			if names := left(t, dir); names != "" {
				t.Errorf("left %s", names)
			}
			if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
				t.Error(err)
			}
		})
	}
}

// What a driver mounts in a snapshot's directory is not used as the snapshot, and its files are not deleted with the
// snapshot.
func TestMountInSnapshot(t *testing.T) {
	snapshottest.Root(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "precious"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s, dir, err := bad(t, "create", `mkdir "$2/fs"; mount --bind `+outside+` "$2/fs"`)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, _ := filepath.Glob(filepath.Join(dir, "tmp/*/fs"))
		for _, m := range mounts {
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
	})
	if _, err := s.Prepare(t.Context(), "k", "", nil); errclass.Status(err) != 4 || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("prepare: %v", err)
	}
	if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
		t.Error(err)
	}
}

// A driver never gets a symbolic link in the store as a parent.
func TestHostileParent(t *testing.T) {
	s, dir, err := bad(t, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "a", "", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "base", "a", snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	fs := filepath.Join(dir, "1/fs")
	if err := errors.Join(os.Rename(fs, filepath.Join(dir, "1/away")), os.Symlink("/etc", fs)); err != nil {
		t.Fatal(err)
	}
	called := filepath.Join(t.TempDir(), "called")
	t.Setenv("BAD_VERB", "create")
	t.Setenv("BAD", scriptOf(t, "touch "+called))
	if _, err := s.Prepare(t.Context(), "b", "base", nil); err == nil {
		t.Error("a parent that is a symbolic link was used")
	}
	if _, err := os.Stat(called); err == nil {
		t.Error("the driver was called")
	}
}

func TestHostileForm(t *testing.T) {
	for what, status := range map[string]int{
		`echo zfs`: 4, `printf tree`: 4, `:`: 4, `exec yes`: 4, `exec cat /dev/zero`: 4, `printf 'tree\ntree\n'`: 4, `exit 3`: 1, `exit 10`: 10,
	} {
		if _, _, err := bad(t, "form", what); errclass.Status(err) != status {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestHostileUsage(t *testing.T) {
	for what, want := range map[string]string{
		`echo 7 2`: "7 2", `echo`: "", `echo 7`: "", `echo -7 2`: "", `echo 7 2 3`: "", `echo "7  2"`: "", `echo 9223372036854775808 1`: "", `echo 1e3 1`: "", `exec yes 7 2`: "",
		`printf '7 2\n7 2\n'`: "", `exit 10`: "0 1", // measured instead
	} {
		s, _, err := bad(t, "usage", what)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Prepare(t.Context(), "k", "", nil); err != nil {
			t.Fatal(err)
		}
		u, err := s.Usage(t.Context(), "k")
		switch got := fmt.Sprint(u.Size, u.Inodes); {
		case want == "" && errclass.Status(err) != 4:
			t.Errorf("%s: %+v, %v", what, u, err)
		case want == "0 1" && (err != nil || u.Inodes != 1), want == "7 2" && (err != nil || got != want):
			t.Errorf("%s: %+v, %v", what, u, err)
		}
	}
}

// A driver never gets directories with names that the store did not choose, since its script may pass names to a shell.
// They are only deleted.
func TestHostileLeftovers(t *testing.T) {
	called := filepath.Join(t.TempDir(), "called")
	s, dir, err := bad(t, "remove", `printf '%s\n' "$2" >>`+called)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "k", "", nil); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(called); err == nil {
		t.Errorf("the driver was called to remove a directory that it has not made: %q", b)
	}
	for _, name := range []string{"x[$(touch PWNED)]", "-1", "+2", "0x3", "4 5", "6\n7", "8"} {
		if err := os.MkdirAll(filepath.Join(dir, "tmp", name, "fs"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Remove(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(called); err != nil || string(b) != "tmp/8\ntmp/1\n" {
		t.Errorf("the driver was called to remove %q: %v", b, err)
	}
	if names := left(t, dir); names != "" {
		t.Errorf("left %s", names)
	}
}

// A driver's statuses for NotFound and AlreadyExists are not taken for statements about snapshots.
func TestStatusOfADriver(t *testing.T) {
	for _, status := range []string{"3", "7"} {
		for _, verb := range []string{"create", "remove"} {
			s, _, err := bad(t, verb, "echo of its own >&2; exit "+status)
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Prepare(t.Context(), "k", "", nil)
			if verb == "remove" && err == nil {
				err = s.Remove(t.Context(), "k")
			}
			if errclass.Status(err) != 1 || !strings.Contains(err.Error(), "of its own") {
				t.Errorf("%s, status %s: %d, %v", verb, status, errclass.Status(err), err)
			}
		}
	}
}

// If a driver fails to remove a snapshot, the next change tries again. The snapshot is not visible in the meantime.
func TestRemoveAgain(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "mark")
	s, dir, err := bad(t, "remove", `[[ -e `+mark+` ]] || { echo "pool is down" >&2; exit 1; }`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "k", "", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "k"); err == nil || !strings.Contains(err.Error(), "pool is down") {
		t.Errorf("remove: %v", err)
	}
	if _, err := s.Stat(t.Context(), "k"); errclass.Status(err) != 3 {
		t.Errorf("stat of what is removed: %v", err)
	}
	if left(t, dir) == "" {
		t.Error("the driver can't be asked again: its directory is gone")
	}
	if err := os.WriteFile(mark, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(t.Context(), "l", "", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "l"); err != nil {
		t.Fatal(err)
	}
	if names := left(t, dir); names != "" {
		t.Errorf("left %s", names)
	}
}

// hangs is a driver that never exits, with a child that ignores SIGTERM. It writes the process IDs of both to a file.
const hangs = `mkdir "$2/fs"; (trap "" TERM; while :; do touch "$2/fs/more"; sleep 0.01; done) >/dev/null 2>&1 & echo $$ $! > "$MARK.new"; mv "$MARK.new" "$MARK"; wait`

// begun waits until the driver runs, and returns the process IDs.
func begun(t *testing.T, mark string) (pids []int) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(mark); err == nil {
			for _, f := range strings.Fields(string(b)) {
				pid, err := strconv.Atoi(f)
				if err != nil {
					t.Fatal(err)
				}
				pids = append(pids, pid)
			}
			return pids
		}
	}
	t.Fatal("the driver was not called")
	return nil
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// When the caller is cancelled, the driver and its child are killed, and nothing is left.
func TestCancel(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "mark")
	t.Setenv("MARK", mark)
	s, dir, err := bad(t, "create", hangs)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error)
	go func() {
		_, err := s.Prepare(ctx, "k", "", nil)
		done <- err
	}()
	pids := begun(t, mark)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("prepare: %v", err)
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d is alive", pid)
		}
	}
	if names := left(t, dir); names != "" {
		t.Errorf("left %s", names)
	}
}

// If the process is killed while a driver runs, the next change deletes what both have left.
func TestKilled(t *testing.T) {
	if root := os.Getenv("SNAPDRIVER_TEST_KILLED"); root != "" {
		s, err := snapshot.Open(root, driver(t, "bad"), snapshot.Options{NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Prepare(t.Context(), "k", "", nil)
		t.Fatal(err)
	}
	mark := filepath.Join(t.TempDir(), "mark")
	t.Setenv("MARK", mark)
	s, dir, err := bad(t, "create", `mkdir "$2/fs"; touch "$2/fs/half"; echo $$ > "$MARK.new"; mv "$MARK.new" "$MARK"; exec sleep 100`)
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(os.Args[0], "-test.run=^TestKilled$")
	c.Env = append(os.Environ(), "SNAPDRIVER_TEST_KILLED="+filepath.Dir(filepath.Dir(dir)))
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pid := begun(t, mark)[0]
	_ = c.Process.Kill()
	_ = c.Wait()
	for end := time.Now().Add(time.Minute); alive(pid) && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	if alive(pid) {
		t.Error("the driver outlives its caller")
	}
	if left(t, dir) == "" {
		t.Error("nothing was left: the test was too late")
	}
	t.Setenv("BAD_VERB", "")
	if _, err := s.Prepare(t.Context(), "l", "", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "l"); err != nil {
		t.Fatal(err)
	}
	if names := left(t, dir); names != "" {
		t.Errorf("left %s", names)
	}
}
