package runtime

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// unifiedRoot returns where cgroup v2 is mounted.
func unifiedRoot(t *testing.T) string {
	t.Helper()
	for _, dir := range cgroupRoots(t) {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Skip("this host has no cgroup v2")
	return ""
}

// caller makes a cgroup of version 2 for a caller. It returns a script that moves a shell into it, in a mount namespace
// without cgroup version 1.
func (m *machine) caller(name string) (dir, script string) {
	m.Helper()
	dir = filepath.Join(unifiedRoot(m.T), name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() {
		_ = os.WriteFile(dir+"/cgroup.kill", []byte("1"), 0)
		until(m.T, "an empty cgroup", func() bool { removeCgroups([]string{dir}); _, err := os.Stat(dir); return err != nil })
	})
	return dir, "echo 0 >" + dir + "/cgroup.procs && mount -t cgroup2 none " + cgroupRoot + " && exec /proc/self/exe"
}

// in returns the test binary as a program in a cgroup of version 2.
func (m *machine) in(c *exec.Cmd, script string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		m.Fatal(err)
	}
	script = strings.Replace(script, "/proc/self/exe", self, 1)
	in := exec.Command("unshare", "-m", "sh", "-c", script)
	in.Env = c.Env
	m.Cleanup(func() {
		if in.Process != nil && in.ProcessState == nil {
			_ = in.Process.Kill()
			_ = in.Wait()
		}
	})
	return in
}

// In the foreground, the container's cgroup is below its caller's, and is killed with that.
func TestCallerKilled(t *testing.T) {
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			testenv.Require(t, "root")
			testenv.Require(t, name)
			testenv.Require(t, "busybox")
			m := newMachine(t, name)
			dir, script := m.caller("test-caller-" + NewID())
			m.unlimited("sleep", "2031")
			c := m.in(m.command("test-caller"), script)
			c.Stderr = os.Stderr
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "a container", func() bool {
				for _, d := range m.below(dir) {
					if len(processes([]string{d})) == 1 {
						return true
					}
				}
				return false
			})
			testenv.Write(t, dir+"/cgroup.kill", "1")
			_ = c.Wait()
			until(t, "its end", func() bool { return len(m.left("none", "sleep 2031")) == 0 })
		})
	}
}

// unlimited writes a configuration without resources: for its device rules, crun would raise a limit in cgroup v2,
// which root of a container may not do.
func (m *machine) unlimited(args ...string) {
	m.Helper()
	m.spec(spec.Options{Args: args})
	var s specs.Spec
	name := filepath.Join(m.bundle, "config.json")
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err == nil {
		s.Linux.Resources = nil
		b, err = json.Marshal(s)
	}
	if err != nil {
		m.Fatal(err)
	}
	testenv.Write(m.T, name, string(b))
}

// below lists the containers' cgroups below another cgroup.
func (m *machine) below(dir string) []string {
	found, err := filepath.Glob(dir + "/distkit-test-*")
	if err != nil {
		m.Fatal(err)
	}
	return found
}

// With another parent cgroup too, the container ends with its caller, by its guard.
func TestCgroupParent(t *testing.T) {
	for _, name := range []string{"runc", "crun"} {
		t.Run(name, func(t *testing.T) {
			testenv.Require(t, "root")
			testenv.Require(t, name)
			testenv.Require(t, "busybox")
			m := newMachine(t, name)
			dir, script := m.caller("test-caller-" + NewID())
			parent, _ := m.caller("test-parent-" + NewID())
			for _, what := range []string{"", "start"} {
				m.unlimited("sleep", "2041")
				c := m.in(m.command("test-parent"), script)
				if what != "" {
					made, err := m.containers().Create(t.Context(), Record{ID: "test-parent", Bundle: m.bundle}, "", nil)
					if err != nil {
						t.Fatal(err)
					}
					c = m.in(m.as("start", made.ID, ""), script)
				}
				c.Env = append(c.Env, "TEST_PARENT=/"+filepath.Base(parent))
				c.Stderr = os.Stderr
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				until(t, "a container and its monitor", func() bool {
					below := m.below(parent)
					return len(below) == 1 && len(processes(below)) == 1 && len(processes([]string{filepath.Join(parent, monitorsName)})) == 1
				})
				if what == "" {
					testenv.Write(t, dir+"/cgroup.kill", "1")
					_ = c.Wait()
					until(t, "its end", func() bool { return len(m.left("none", "sleep 2041")) == 0 && len(m.below(parent)) == 0 })
					continue
				}
				if err := c.Wait(); err != nil {
					t.Fatal(err)
				}
				testenv.Write(t, dir+"/cgroup.kill", "1") // the caller's cgroup has nothing of the container
				below := m.below(parent)
				if got := processes(below); len(got) != 1 {
					t.Errorf("%v run in %q", got, below)
				}
				if _, err := killCgroups(below); err != nil {
					t.Error(err)
				}
				until(t, "its end", func() bool { return len(m.left("none", "sleep 2041")) == 0 && len(m.below(parent)) == 0 })
			}
		})
	}
	r := &Runtime{}
	if err := r.CgroupParent("/a/../b"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	for given, want := range map[string]string{"": "", "a/b": "/a/b", "/a/": "/a", cgroupRoot + "/a": "/a"} {
		r.cgroupParent = ""
		if err := r.CgroupParent(given); err != nil || r.cgroupParent != want {
			t.Errorf("%q: %q %v", given, r.cgroupParent, err)
		}
	}
}

// A cgroup with processes enables no controllers for its children, unless its processes may be moved.
func TestHandOn(t *testing.T) {
	testenv.Require(t, "root")
	root := unifiedRoot(t)
	b, err := os.ReadFile(root + "/cgroup.controllers")
	if err != nil || len(strings.Fields(string(b))) == 0 {
		t.Skip("cgroup v2 has no controllers here")
	}
	have := strings.Fields(string(b))[0]
	before, err := os.ReadFile(root + "/cgroup.subtree_control")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, "test-hand-"+NewID())
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	process := sleeper(t)
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
		until(t, "an empty cgroup", func() bool { removeCgroups([]string{dir}); _, err := os.Stat(dir); return err != nil })
		if !slices.Contains(strings.Fields(string(before)), have) {
			_ = os.WriteFile(root+"/cgroup.subtree_control", []byte("-"+have), 0)
		}
	})
	testenv.Write(t, root+"/cgroup.subtree_control", "+"+have)
	testenv.Write(t, dir+"/cgroup.procs", strconv.Itoa(process.Process.Pid))
	if !handOn(dir, nil) {
		t.Error("nothing can't be handed on")
	}
	if handOn(dir, []string{"none"}) {
		t.Error("what is not there is handed on")
	}
	if handOn(dir, []string{have}) {
		t.Skipf("%s is handed on beside processes", have)
	}
	if got := processes([]string{dir}); !slices.Equal(got, []int{process.Process.Pid}) {
		t.Errorf("%v", got)
	}
	if err := unix.Setxattr(dir, "trusted.delegate", []byte("1"), 0); err != nil {
		t.Skip(err)
	}
	if !handOn(dir, []string{have}) {
		t.Errorf("%s is not handed on", have)
	}
	if got := processes([]string{filepath.Join(dir, supervisorName)}); !slices.Equal(got, []int{process.Process.Pid}) {
		t.Errorf("%v are put aside", got)
	}
	p, ok := placeUnified(cgroupMount{dir: root, own: "/" + filepath.Base(dir) + "/" + supervisorName}, "", "x", []string{have})
	if want := "/" + filepath.Base(dir) + "/x"; !ok || p.path != want {
		t.Errorf("the next is at %q, not at %q", p.path, want)
	}
}
