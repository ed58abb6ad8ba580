package runtime

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

// sleeper starts a process that is killed at the end of the test.
func sleeper(t *testing.T) *exec.Cmd {
	t.Helper()
	c := exec.Command("sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	return c
}

// runs reports whether a child is still running.
func runs(c *exec.Cmd) bool {
	s, err := statOf(c.Process.Pid)
	return err == nil && s.state != 'Z'
}

// cgroupRoots returns directories below which a test may make cgroups: one of version 1, and one of version 2.
func cgroupRoots(t *testing.T) []string {
	t.Helper()
	var roots []string
	for _, dir := range []string{"pids", "unified", ""} {
		dir = filepath.Join(cgroupRoot, dir)
		if _, err := os.Stat(dir + "/cgroup.procs"); err == nil {
			roots = append(roots, dir)
		}
	}
	if len(roots) == 0 {
		t.Skip("no cgroups are mounted")
	}
	return roots
}

// A cgroup with a container's ID as its name is not the container's, and what runs there is left alone.
func TestForeignCgroup(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		id := "test-foreign-" + NewID()
		for _, root := range cgroupRoots(t) {
			foreign, inner := filepath.Join(root, id), filepath.Join(root, id, "inner")
			if err := os.MkdirAll(inner, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				until(t, "an empty cgroup", func() bool { err := unix.Rmdir(inner); return err == nil || err == unix.ENOENT })
				_ = unix.Rmdir(foreign)
			})
			other := sleeper(t)
			testenv.Write(t, filepath.Join(inner, "cgroup.procs"), strconv.Itoa(other.Process.Pid))

			m.spec(spec.Options{Args: []string{"sleep", "1000"}})
			c := m.detached(Record{ID: id})
			l, err := c.proc("").look()
			if err != nil {
				t.Fatal(err)
			}
			if len(l.state.Cgroups) == 0 {
				m.Error("it has no cgroups")
			}
			for _, d := range l.state.Cgroups {
				if strings.HasPrefix(d+"/", foreign+"/") {
					m.Errorf("it is in %s", d)
				}
			}
			all, err := c.Processes()
			if err != nil || slices.ContainsFunc(all, func(p InContainer) bool { return p.Pid == other.Process.Pid }) {
				m.Errorf("%+v %v", all, err)
			}
			if err := c.KillAll(t.Context(), unix.SIGKILL); err != nil {
				m.Error(err)
			}
			if _, err := c.Remove(t.Context(), true); err != nil {
				m.Error(err)
			}
			if !runs(other) {
				m.Errorf("what ran in %s was killed", inner)
			}
			_ = other.Process.Kill()
			_ = other.Wait()
			until(t, "an empty cgroup", func() bool { return unix.Rmdir(inner) == nil })
			m.spec(spec.Options{Args: []string{"true"}})
			if out, err := m.command(id).CombinedOutput(); err != nil {
				m.Errorf("%v %s", err, out)
			}
			if err := unix.Rmdir(foreign); err != nil {
				m.Errorf("the empty cgroup of another: %v", err)
			}
		}
	})
}

// Containers with the same ID in two state directories, and one that was started by the runtime alone, do not affect
// each other.
func TestSameIDElsewhere(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		id := "test-same-" + NewID()
		m.spec(spec.Options{Args: []string{"sleep", "1000"}})
		other := newMachine(t, m.runtime)
		other.spec(spec.Options{Args: []string{"sleep", "1000"}})
		third := newMachine(t, m.runtime)
		third.spec(spec.Options{Args: []string{"sleep", "1000"}})
		a, b := m.detached(Record{ID: id}), other.detached(Record{ID: id})
		plain := func(args ...string) *exec.Cmd {
			return exec.Command(m.runtime, append([]string{"--root", filepath.Join(third.state, "plain")}, args...)...)
		}
		c := plain("run", "--bundle", third.bundle, id)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = plain("delete", "--force", id).Run()
			_ = c.Wait()
		})
		until(t, "a plain container", func() bool {
			out, err := plain("state", id).Output()
			return err == nil && strings.Contains(string(out), `"running"`)
		})
		for _, c := range []*Container{a, b} {
			if all, err := c.Processes(); err != nil || len(all) != 1 {
				m.Errorf("%+v %v", all, err)
			}
		}
		if _, err := a.Remove(t.Context(), true); err != nil {
			m.Error(err)
		}
		if i := m.info(b); i.Status != Running {
			m.Errorf("the other of its ID is %s", i.Status)
		}
		if !runs(c) {
			m.Error("what the runtime ran by itself was killed")
		}
		if _, err := b.Remove(t.Context(), true); err != nil {
			m.Error(err)
		}
		if out, err := plain("state", id).Output(); err != nil || !strings.Contains(string(out), `"running"`) {
			m.Errorf("what the runtime ran by itself: %s %v", out, err)
		}
	})
}

// A process is signalled only if it is still listed after it has been opened.
func TestSignalAll(t *testing.T) {
	stays, goes := sleeper(t), sleeper(t)
	lists := [][]int{{stays.Process.Pid, goes.Process.Pid}, {goes.Process.Pid}}
	err := signalAll(func() []int {
		l := lists[0]
		lists = lists[1:]
		return l
	}, unix.SIGKILL)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the one's end", func() bool { return !runs(goes) })
	if !runs(stays) {
		t.Error("a process that has left was killed")
	}
}

// Killing a cgroup also kills the cgroups below it, even frozen ones.
func TestKillCgroups(t *testing.T) {
	testenv.Require(t, "root")
	for _, root := range cgroupRoots(t) {
		dir := filepath.Join(root, "distkit-test-kill-"+NewID())
		inner := filepath.Join(dir, "inner")
		if err := os.MkdirAll(inner, 0o755); err != nil {
			t.Fatal(err)
		}
		defer removeCgroups([]string{dir})
		outside, above, below := sleeper(t), sleeper(t), sleeper(t)
		testenv.Write(t, dir+"/cgroup.procs", strconv.Itoa(above.Process.Pid))
		testenv.Write(t, inner+"/cgroup.procs", strconv.Itoa(below.Process.Pid))
		if _, err := os.Stat(dir + "/cgroup.freeze"); err == nil {
			testenv.Write(t, dir+"/cgroup.freeze", "1")
		}
		left, err := killCgroups([]string{dir})
		if !left || err != nil {
			t.Errorf("%s: %v %v", root, left, err)
		}
		until(t, "an end", func() bool { return !runs(above) && !runs(below) })
		if !runs(outside) {
			t.Error("a process outside was killed")
		}
		if left, err := killCgroups([]string{dir}); left || err != nil {
			t.Errorf("%s: empty: %v %v", root, left, err)
		}
	}
}

// Cgroups in config.json are ignored, and relative paths in it are relative to the bundle.
func TestPrivateBundle(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		foreign := filepath.Join(cgroupRoots(t)[0], "test-named-"+NewID())
		if err := os.Mkdir(foreign, 0o755); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Rmdir(foreign) }()
		m.spec(spec.Options{Args: []string{"sh", "-c", "cat /file; exec sleep 1000"}})
		config := filepath.Join(m.bundle, "config.json")
		b, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Replace(string(b), `"linux":{`, `"linux":{"cgroupsPath":"/`+filepath.Base(foreign)+`",`, 1)
		text = strings.Replace(text, `"mounts":[`, `"mounts":[{"destination":"/file","source":"file","type":"bind","options":["bind"]},`, 1)
		testenv.Write(t, config, text)
		testenv.Write(t, filepath.Join(m.bundle, "file"), "its own\n")
		testenv.Write(t, filepath.Join(m.bundle, "rootfs/file"), "")
		c := m.detached(Record{ID: "test-private"})
		until(t, "output", func() bool { return strings.Contains(m.log(c), "its own") })
		if got := processes([]string{foreign}); len(got) > 0 {
			m.Errorf("%v are in %s", got, foreign)
		}
		if _, err := c.Remove(t.Context(), true); err != nil {
			m.Error(err)
		}
		if err := unix.Rmdir(foreign); err != nil {
			m.Error(err)
		}
	})
}
