package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// killAt is the variable that makes a process of the test binary, or its shim, kill itself at a step of a run.
const killAt = "TEST_KILL_AT"

func init() {
	if step := os.Getenv(killAt); step != "" {
		atStep = func(s string) {
			if s == step {
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
				select {}
			}
		}
	}
}

// bound mounts a directory as the root filesystem, and counts the snapshots.
type bound struct{ source string }

func (b bound) Prepare(ctx context.Context, s Snapshot, _, target string) error {
	f, err := os.OpenFile(filepath.Join(b.source, "snapshot-"+s.Key), os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), b.Mount(ctx, s, target))
}

func (b bound) Mount(_ context.Context, _ Snapshot, target string) error {
	if mounted(target) {
		return nil
	}
	return unix.Mount(filepath.Join(b.source, "rootfs"), target, "", unix.MS_BIND, "")
}

func (b bound) MountFor(ctx context.Context, s Snapshot, target string, _ *os.File) error {
	return b.Mount(ctx, s, target)
}

func (bound) Unmount(target string) error {
	if !mounted(target) {
		return nil // an ordinary user can't set it, and need not
	}
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (b bound) Remove(_ context.Context, s Snapshot) error {
	err := os.Remove(filepath.Join(b.source, "snapshot-"+s.Key))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// bound returns the machine's store with a snapshot for each container.
func (m *machine) bound() *Containers {
	m.Helper()
	all, err := Open(filepath.Join(m.state, "store"), "default", m.state, bound{m.bundle}, nil)
	if err != nil {
		m.Fatal(err)
	}
	return all
}

// snapshotted makes a container with a snapshot and a configuration.
func (m *machine) snapshotted(id string, rec Record) *Container {
	m.Helper()
	testenv.Write(m.T, filepath.Join(m.bundle, "snapshot-"+id), "")
	rec.ID, rec.Snapshot = id, &Snapshot{Key: id}
	c, err := m.bound().Create(m.Context(), rec, "", nil)
	if err != nil {
		m.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(m.bundle, "config.json"))
	if err != nil {
		m.Fatal(err)
	}
	testenv.Write(m.T, filepath.Join(c.Dir(), "config.json"), string(b))
	return c
}

// as returns the test binary as a program that makes or runs a container.
func (m *machine) as(what, id, step string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "TEST_RUN="+strings.Join([]string{m.runtime, m.state, id, m.bundle, what}, "|"), killAt+"="+step, "TEST_SNAPSHOTS="+m.bundle)
	m.endWithTest(c)
	return c
}

// Whichever process is killed at whichever step, the next calls report the true status, can run the container again,
// and leave nothing of it behind.
func TestKilledAtEveryStep(t *testing.T) {
	steps := []string{"claimed", "blank", "creating", "mounted", "shim", "ready", "started", "running", "reaped", "ended", "removed", "unmounted", "recorded", "remove", "snapshot removed"}
	runtimes(t, func(t *testing.T, m *machine) {
		if err := os.MkdirAll(m.bound().root, 0o700); err != nil {
			t.Fatal(err)
		}
		volume, err := m.bound().Volume(t.Context(), "db", func(dir *os.File) error { return os.WriteFile(filepath.Join(dir.Name(), "file"), nil, 0o600) })
		if err != nil {
			t.Fatal(err)
		}
		mounts := []specs.Mount{{Type: "bind", Source: volume, Destination: "/data", Options: []string{"rbind"}}}
		for _, what := range []string{"run", "start"} {
			for _, keep := range []bool{true, false} {
				if m.runtime != "runc" && keep == (what == "run") {
					continue // half of the steps are enough for a second runtime
				}
				for _, step := range steps {
					if what == "run" && (step == "shim" || step == "reaped") || keep && (step == "remove" || step == "snapshot removed") {
						continue
					}
					name := fmt.Sprintf("%s, keep %v, killed at %q", what, keep, step)
					m.spec(spec.Options{Args: []string{"sh", "-c", "cat /data/file && sleep 0.2; exit 3"}, Mounts: mounts})
					c := m.snapshotted("test-step", Record{RemoveAtEnd: !keep})
					out, err := m.as(what, "test-step", step).CombinedOutput()
					if what == "run" && err == nil {
						t.Errorf("%s: it was not killed: %s", name, out)
					}
					m.truth(name, c, step)
					// The ID is free again, whatever was left.
					if _, err := c.Remove(t.Context(), true); err != nil && !errdefs.IsNotFound(err) {
						t.Errorf("%s: remove: %v", name, err)
					}
					if !keep {
						m.bound().Clear(t.Context())
					}
					m.spec(spec.Options{Args: []string{"sh", "-c", "cat /data/file && exit 9"}, Mounts: mounts})
					again := m.snapshotted("test-step", Record{RemoveAtEnd: true})
					if status, err := m.as("run", again.ID, "").CombinedOutput(); m.code(err) != 9 {
						t.Errorf("%s: and again: %v %s", name, err, status)
					}
					if left, _ := filepath.Glob(m.bundle + "/snapshot-*"); len(left) > 0 {
						t.Errorf("%s: snapshots are left: %q", name, left)
						_ = os.Remove(left[0])
					}
				}
			}
		}
		if _, err := os.Stat(filepath.Join(volume, "file")); err != nil {
			t.Error(err)
		}
	})
}

// truth checks that a container's status agrees with its processes, once everything has settled.
func (m *machine) truth(name string, c *Container, step string) {
	m.Helper()
	// The process sleeps for at most a fifth of a second.
	end := time.Now().Add(time.Minute)
	for {
		now, err := m.bound().Get(c.ID)
		if errdefs.IsNotFound(err) {
			return
		}
		if err != nil {
			m.Errorf("%s: %v", name, err)
			return
		}
		i, err := now.Info()
		if errdefs.IsNotFound(err) { // removed since Get
			return
		}
		if err != nil {
			m.Errorf("%s: %v", name, err)
			return
		}
		if i.Status == Running && (i.Pid == 0 || unix.Kill(i.Pid, 0) != nil) && !monitored(c) {
			// It may have ended since the first look. By now it has.
			if i, err = now.Info(); err == nil && i.Status == Running {
				m.Errorf("%s: %+v", name, i)
				return
			}
			continue
		}
		switch {
		case i.Status == Stopped && i.Exit == nil:
			m.Errorf("%s: %+v", name, i)
			return
		case i.Status == Stopped, i.Status == Created:
			if i.Status == Stopped && i.Exit.Status != nil && *i.Exit.Status != 3 {
				m.Errorf("%s: exit status %d", name, *i.Exit.Status)
			}
			// The end is recorded before anything is cleaned up.
			if recorded := step == "recorded" || step == "removed" || step == "unmounted"; recorded && (i.Status != Stopped || i.Exit.Status == nil) {
				m.Errorf("%s: its exit is lost: %s %+v", name, i.Status, i.Exit)
			}
			return
		}
		if time.Now().After(end) {
			m.Errorf("%s: it is %s for ever", name, i.Status)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func monitored(c *Container) bool {
	l, err := c.proc("").look()
	return err == nil && l.monitored
}

func (m *machine) code(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		m.Fatal(err)
	}
	return 0
}

// A container continues without its shim. The next call that works on it starts another shim, which copies the output
// of the meantime and, if the kernel reports it, records the exit status.
func TestShimKilled(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		// Its output has another descriptor by then.
		m.spec(spec.Options{Args: []string{"sh", "-c", "trap 'echo told >&3; exit 6' TERM; exec 3>&1 >/dev/null; echo before >&3; while ! test -e /go; do sleep 0.02; done; echo meanwhile >&3; while :; do sleep 0.02; done"}})
		c := m.detached(Record{ID: "test-shim"})
		l, err := c.proc("").look()
		if err != nil {
			t.Fatal(err)
		}
		until(t, "output", func() bool { return strings.Contains(m.log(c), "before") })
		if err := l.state.Monitor.signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, "the shim's death", func() bool { return !l.state.Monitor.Alive() })
		if i := m.info(c); i.Status != Running || i.Pid != l.state.Pid {
			m.Errorf("without its shim: %+v", i)
		}
		testenv.Write(t, filepath.Join(m.bundle, "rootfs/go"), "")
		m.containers().Clear(t.Context())
		if i := m.info(c); i.Status != Running {
			m.Errorf("after a clearing: %+v", i)
		}
		// Reading the log is enough to start another shim.
		until(t, "what it printed meanwhile", func() bool {
			var text strings.Builder
			if err := c.proc("").Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error { text.Write(e.Text); return nil }); err != nil {
				t.Fatal(err)
			}
			return strings.Contains(text.String(), "meanwhile")
		})
		if !monitored(c) {
			m.Error("no other shim")
		}
		if err := c.proc("").Kill(t.Context(), unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		e, err := c.proc("").Wait(t.Context())
		if err != nil || e == nil || e.Status == nil || *e.Status != 6 {
			m.Errorf("%+v %v", e, err)
		}
		if !strings.Contains(m.log(c), "told") {
			m.Errorf("log %q", m.log(c))
		}
		if _, err := c.Remove(t.Context(), false); err != nil {
			m.Error(err)
		}
		_ = os.Remove(filepath.Join(m.bundle, "rootfs/go"))
	})
}

// The same holds for a further process.
func TestExecShimKilled(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "1000"}})
		c := m.detached(Record{ID: "test-exec-shim"})
		script := "trap 'echo told; exit 6' TERM; echo before; read x; echo heard $x; while :; do sleep 0.02; done"
		id, err := c.StartExec(t.Context(), Exec{ID: "further", Args: []string{"sh", "-c", script}, Interactive: true})
		if err != nil {
			m.Fatal(err)
		}
		dir := c.path("exec", id)
		log := func() string {
			b, _ := os.ReadFile(filepath.Join(dir, "log"))
			return string(b)
		}
		until(m.T, "output", func() bool { return strings.Contains(log(), "before") })
		l, err := c.proc(id).look()
		if err != nil || l.state == nil {
			m.Fatal(err)
		}
		if err := l.state.Monitor.signal(unix.SIGKILL); err != nil {
			m.Fatal(err)
		}
		until(m.T, "the shim's death", func() bool { return !l.state.Monitor.Alive() })
		if l, err = c.proc(id).look(); err != nil || l.status != Running || l.monitored {
			t.Errorf("without its shim: %+v %v", l, err)
		}
		if err := c.proc(id).Kill(t.Context(), unix.SIGCONT); err != nil {
			m.Fatal(err)
		}
		if l, err = c.proc(id).look(); err != nil || l.status != Running || !l.monitored {
			t.Errorf("with another shim: %+v %v", l, err)
		}
		// No writer of its input was left.
		until(m.T, "the end of its input", func() bool { return strings.Contains(log(), "heard") })
		if err := c.proc(id).Kill(t.Context(), unix.SIGTERM); err != nil {
			m.Fatal(err)
		}
		e, err := c.proc(id).Wait(t.Context())
		if err != nil || e == nil || e.Status == nil || *e.Status != 6 {
			m.Errorf("%+v %v", e, err)
		}
		if !strings.Contains(log(), "told") {
			m.Errorf("log %q", log())
		}
		if e, err := c.proc(id).Remove(t.Context(), false); err != nil || e == nil || *e.Status != 6 {
			m.Errorf("remove: %+v %v", e, err)
		}
		if _, err := c.Remove(t.Context(), true); err != nil {
			m.Error(err)
		}
	})
}

func (m *machine) log(c *Container) string {
	b, _ := os.ReadFile(c.path("log"))
	return string(b)
}

// After a boot the state directories and processes are gone. Running containers are stopped, those to be removed at
// their end are removed, and all others can be run again.
func TestBoot(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "1000"}})
		keep, gone := m.snapshotted("test-keep", Record{}), m.snapshotted("test-gone", Record{RemoveAtEnd: true})
		for _, c := range []*Container{keep, gone} {
			if out, err := m.as("start", c.ID, "").CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
			l, err := c.proc("").look()
			if err != nil {
				t.Fatal(err)
			}
			if err := l.state.Monitor.signal(unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := killAll(t.Context(), l.state); err != nil {
				t.Fatal(err)
			}
			removeCgroups(l.state.Cgroups)
			if err := (bound{}).Unmount(c.path("rootfs")); err != nil {
				t.Fatal(err)
			}
			// State of another boot: its process number may be another process's now.
			s := *l.state
			s.Pid, s.Boot, s.Monitor.Pid, s.Monitor.Boot = os.Getpid(), "00000000-0000-0000-0000-000000000000", os.Getpid(), "00000000-0000-0000-0000-000000000000"
			if err := c.proc("").writeState(s); err != nil {
				t.Fatal(err)
			}
		}
		for _, dir := range []string{"run", "lock", "due", filepath.Base(m.runtime)} {
			if err := os.RemoveAll(filepath.Join(m.state, dir)); err != nil {
				t.Fatal(err)
			}
		}
		i := m.info(keep)
		if i.Status != Stopped || i.Pid != 0 || i.Exit == nil || i.Exit.Status != nil || i.Exit.Error == "" {
			m.Errorf("%+v %+v", i, i.Exit)
		}
		if err := keep.KillAll(t.Context(), unix.SIGKILL); !errdefs.IsFailedPrecondition(err) {
			m.Errorf("kill: %v", err)
		}
		m.bound().Clear(t.Context())
		if _, err := m.bound().Get("test-gone"); !errdefs.IsNotFound(err) {
			m.Errorf("what was to be removed is there: %v", err)
		}
		if out, err := m.as("start", keep.ID, "").CombinedOutput(); err != nil {
			m.Errorf("again: %v %s", err, out)
		}
		if i := m.info(keep); i.Status != Running {
			m.Errorf("again: %+v", i)
		}
		if _, err := keep.Remove(t.Context(), true); err != nil {
			m.Error(err)
		}
	})
}

// Clear checks all containers once after each boot. Later it checks only those that may have left something, not
// thousands of stopped ones.
func TestClearLooksAtFew(t *testing.T) {
	t.Parallel()
	all, err := Open(t.TempDir(), "default", t.TempDir(), bound{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	lost := func(id string) *Container {
		c, err := all.Create(t.Context(), Record{ID: id}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.proc("").blankExit(); err != nil { // as a boot during a run leaves it
			t.Fatal(err)
		}
		return c
	}
	recorded := func(c *Container) bool {
		e, _, err := c.proc("").readExit()
		if err != nil {
			t.Fatal(err)
		}
		return e != nil
	}
	if _, err := all.Create(t.Context(), Record{ID: "kept"}, "", nil); err != nil {
		t.Fatal(err)
	}
	all.Clear(t.Context()) // the first call after the boot with a container
	before, other := lost("before"), lost("other")
	dead := HostProcess{Pid: 1<<22 + 1, Boot: bootID()}
	if _, err := all.Create(t.Context(), Record{ID: "made", RemoveAtEnd: true, Owner: &dead}, "", nil); err != nil {
		t.Fatal(err)
	}
	all.Clear(t.Context())
	if recorded(before) {
		t.Error("a stopped container was looked at for the second time in one boot")
	}
	if _, err := all.Get("made"); !errdefs.IsNotFound(err) {
		t.Errorf("what a dead process was making is left: %v", err)
	}
	if err := all.writeDue(seen, "another boot"); err != nil {
		t.Fatal(err)
	}
	all.Clear(t.Context())
	if !recorded(before) || !recorded(other) {
		t.Error("the first clearing of a boot has not seen a container whose end was lost")
	}
	dir, err := all.dueDir()
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v %v", left, err)
	}
}

// If the disk is full when a container ends, its output is lost, but not its exit status.
func TestFullDisk(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		store := filepath.Join(m.state, "store")
		if err := os.MkdirAll(store, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", store, "tmpfs", 0, "size=256k"); err != nil {
			t.Fatal(err)
		}
		defer func() {
			until(t, "an end of its shim", func() bool { return unix.Unmount(store, 0) == nil })
		}()
		m.spec(spec.Options{Args: []string{"sh", "-c", "while ! test -e /full; do sleep 0.01; done; i=0; while [ $i -lt 3000 ]; do echo a line of some length $i; i=$((i+1)); done; exit 4"}})
		c := m.detached(Record{ID: "test-full"})
		f, err := os.Create(filepath.Join(store, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(make([]byte, 1<<20))
		f.Close()
		if err == nil {
			t.Fatal("the disk is not full")
		}
		testenv.Write(t, filepath.Join(m.bundle, "rootfs/full"), "")
		i := m.stopped(c)
		if i.Exit.Status == nil || *i.Exit.Status != 4 {
			m.Errorf("%+v", i.Exit)
		}
		if log := m.log(c); log != "" && !strings.HasSuffix(log, "\n") {
			m.Errorf("the log ends with half a line: %q", log[max(0, len(log)-80):])
		}
		_ = os.Remove(filepath.Join(m.bundle, "rootfs/full"))
		if _, err := c.Remove(t.Context(), false); err != nil {
			m.Error(err)
		}
	})
}

// host returns what containers may leave on the host.
func host(t *testing.T, m *machine) map[string][]string {
	t.Helper()
	all := map[string][]string{}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, m.state) || strings.Contains(line, m.bundle) {
			all["mounts"] = append(all["mounts"], line)
		}
	}
	for _, pattern := range []string{cgroupRoot + "/*/distkit-test-many*", cgroupRoot + "/*" + defaultParent + "/distkit-test-many*", m.state + "/run/*", m.state + "/lock/*", filepath.Join(m.state, filepath.Base(m.runtime), "*"), m.state + "/store/containers/*/*"} {
		found, _ := filepath.Glob(pattern)
		all[pattern] = found
	}
	mountsOf, _ := cgroupMounts()
	for _, c := range mountsOf {
		found, _ := filepath.Glob(filepath.Join(c.dir, c.own) + "/distkit-test-*")
		all["own cgroups"] = append(all["own cgroups"], found...)
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		if b, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline"); bytes.HasPrefix(b, []byte(shimName+"\x00test-many")) {
			all["processes"] = append(all["processes"], string(b))
		}
		if b, _ := os.ReadFile("/proc/" + e.Name() + "/cgroup"); bytes.Contains(b, []byte("/distkit-test-many")) {
			all["processes"] = append(all["processes"], e.Name())
		}
	}
	return all
}

// A hundred concurrent containers, started and ended in all ways, leave nothing.
func TestHundred(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		if m.runtime != "runc" {
			return // crun needs a mount namespace for each of them here
		}
		before := host(t, m)
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo hello; exec sleep 0.$((RANDOM % 5))"}})
		limit := make(chan struct{}, 16)
		var wg sync.WaitGroup
		var mu sync.Mutex
		for n := range 100 {
			wg.Go(func() {
				limit <- struct{}{}
				defer func() { <-limit }()
				id := fmt.Sprintf("test-many-%d", n)
				mu.Lock()
				c := m.snapshotted(id, Record{RemoveAtEnd: n%3 == 0})
				mu.Unlock()
				verb := "start"
				if n%3 == 1 {
					verb = "run"
				}
				out, err := m.as(verb, id, "").CombinedOutput()
				if err != nil {
					t.Errorf("%s %s: %v %s", verb, id, err, out)
				}
				switch {
				case n%3 == 0: // removed at its end
				case n%2 == 0:
					if _, err := c.proc("").Wait(t.Context()); err != nil {
						t.Errorf("wait %s: %v", id, err)
					}
					fallthrough
				default:
					if _, err := c.Remove(t.Context(), true); err != nil {
						t.Errorf("remove %s: %v", id, err)
					}
				}
			})
		}
		wg.Wait()
		var after map[string][]string
		same := func() bool {
			after = host(t, m)
			a, _ := json.Marshal(before)
			b, _ := json.Marshal(after)
			return bytes.Equal(bytes.ReplaceAll(a, []byte("null"), []byte("[]")), bytes.ReplaceAll(b, []byte("null"), []byte("[]")))
		}
		for range 6000 {
			if same() {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if !same() {
			t.Errorf("left behind: %q", after)
		}
		if left, _ := filepath.Glob(m.bundle + "/snapshot-*"); len(left) > 0 {
			t.Errorf("snapshots are left: %q", left)
		}
	})
}
