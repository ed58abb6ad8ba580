package runtime

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// testJoins are the namespaces of a run in the foreground: KIND=ID, separated by spaces.
func testJoins() map[specs.LinuxNamespaceType]string {
	joins := map[specs.LinuxNamespaceType]string{}
	for _, s := range strings.Fields(os.Getenv("TEST_JOIN")) {
		kind, id, _ := strings.Cut(s, "=")
		joins[specs.LinuxNamespaceType(kind)] = id
	}
	return joins
}

// pod returns options and a record for a container that joins another's namespaces.
func pod(owner string, args ...string) (spec.Options, map[specs.LinuxNamespaceType]string) {
	of := spec.Sharing("container:" + owner)
	o := spec.Options{Args: args, PID: of, IPC: of, UTS: of, Network: string(of)}
	return o, o.Joins()
}

// namespacesOf returns the identities of those namespaces of a process that containers can share.
func namespacesOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, name := range namespaceFiles {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		all[name] = link
	}
	return all
}

// A container joins another's namespaces, detached and in the foreground, sees its processes, and leaves nothing in
// them.
func TestJoin(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "1000"}, Hostname: "the-pod"})
		owner := m.detached(Record{ID: "test-owner"})
		owned := namespacesOf(t, m.info(owner).Pid)

		o, joins := pod("test-owner", "sh", "-c", "cat /proc/1/cmdline; echo; sleep 1001 & exec sleep 1002")
		m.spec(o)
		second := m.detached(Record{ID: "test-second", Namespaces: joins})
		until(t, "output", func() bool { return strings.Contains(m.log(second), "sleep") })
		if got := m.log(second); !strings.Contains(got, "sleep\x001000\x00") {
			t.Errorf("the first process that it sees: %q", got)
		}
		if got := namespacesOf(t, m.info(second).Pid); !maps.Equal(got, owned) {
			t.Errorf("it has the namespaces %v, not %v", got, owned)
		}
		if err := second.Checkpoint(t.Context(), t.TempDir(), true, nil); !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotImplemented(err) {
			t.Errorf("it is stored: %v", err)
		}

		o.Args = []string{"sh", "-c", "sleep 1003 & cat /proc/sys/kernel/hostname; ls -l /proc/self/ns; exit 7"}
		m.spec(o)
		c := m.command("test-third")
		c.Env = append(c.Env, "TEST_JOIN=pid=test-owner ipc=test-owner uts=test-owner network=test-owner")
		out, err := c.Output()
		if c.ProcessState.ExitCode() != 7 || !strings.HasPrefix(string(out), "the-pod\n") {
			t.Errorf("in the foreground: %q, %v", out, err)
		}
		for name, link := range owned {
			if !strings.Contains(string(out), link) {
				t.Errorf("in the foreground, the %s namespace is not %s: %s", name, link, out)
			}
		}

		// What the container has left in the PID namespace was ended with it. Other processes there continue.
		processes := func() string {
			all, err := exec.Command("ps", "-eo", "args").Output()
			if err != nil {
				t.Fatal(err)
			}
			return string(all)
		}
		if all := processes(); strings.Contains(all, "sleep 1003") || !strings.Contains(all, "sleep 1000") || !strings.Contains(all, "sleep 1001") {
			t.Errorf("processes: %s", all)
		}
		if _, err := second.Remove(t.Context(), true); err != nil {
			t.Error(err)
		}
		if all := processes(); strings.Contains(all, "sleep 1001") || !strings.Contains(all, "sleep 1000") {
			t.Errorf("processes after a removal: %s", all)
		}

		// When the first process of a PID namespace ends, all others in it are killed.
		o.Args = []string{"sleep", "1004"}
		m.spec(o)
		last := m.detached(Record{ID: "test-last", Namespaces: joins})
		if _, err := owner.Remove(t.Context(), true); err != nil {
			t.Error(err)
		}
		if e, err := last.proc("").Wait(t.Context()); err != nil || e.Status == nil || *e.Status != 137 {
			t.Errorf("its end: %+v, %v", e, err)
		}
		_, err = last.Start(t.Context(), m.find())
		if !errdefs.IsNotFound(err) || !strings.Contains(fmt.Sprint(err), "no container test-owner") {
			t.Errorf("started without the other: %v", err)
		}
		if _, err := last.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
	})
}

// Containers whose process has ended, and those that another user has made, have no namespaces to join.
func TestJoinRefuses(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"true"}})
		ended := m.detached(Record{ID: "test-ended"})
		if _, err := ended.proc("").Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, joins := pod("test-ended")
		_, _, err := m.containers().StartBundle(t.Context(), m.finder, Record{ID: "test-late", Bundle: m.bundle, Namespaces: joins})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "container test-ended is stopped") {
			t.Errorf("one that has ended: %v", err)
		}
		name := filepath.Join(ended.Dir(), "container.json")
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(strings.Replace(string(b), `"seal":"`, `"seal":"00`, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err = m.containers().StartBundle(t.Context(), m.finder, Record{ID: "test-late", Bundle: m.bundle, Namespaces: joins})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "was not made by this user") {
			t.Errorf("a stranger's: %v", err)
		}
		if _, err := ended.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
		// The seal of a record covers the containers that it names.
		made, err := m.containers().Create(t.Context(), Record{ID: "test-made", Namespaces: joins}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		made.Namespaces[specs.NetworkNamespace] = "other"
		if made.isSealed() {
			t.Error("a changed record has a valid seal")
		}
		if _, err := made.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
	})
}

// A PID namespace is not joined if nothing could end what the container leaves there.
func TestJoinNeedsCgroup(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]bool{"": false, "/proc/7/ns/pid": true} {
		s := &specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: path}}}}
		if err := checkEnds(s, nil); errdefs.IsNotImplemented(err) != want {
			t.Errorf("%q without a cgroup: %v", path, err)
		}
		if err := checkEnds(s, []string{"/c"}); err != nil {
			t.Errorf("%q with a cgroup: %v", path, err)
		}
	}
}

// A namespace is opened only of the very process that was recorded, not of a later one with its number.
func TestOpenNamespaceOfAnotherProcess(t *testing.T) {
	t.Parallel()
	self, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]HostProcess{
		"another start": {Pid: self.Pid, Start: self.Start + 1, Boot: self.Boot},
		"another boot":  {Pid: self.Pid, Start: self.Start, Boot: "x"},
	} {
		s, err := Open(t.TempDir(), "default", filepath.Join(t.TempDir(), "state"), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		c, err := s.Create(t.Context(), Record{ID: "one"}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		p := p
		if err := os.MkdirAll(c.proc("").private, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := c.proc("").writeState(state{Status: Running, HostProcess: p, Monitor: self, Started: time.Now()}); err != nil {
			t.Fatal(err)
		}
		if f, err := s.openNamespace("one", specs.NetworkNamespace); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
}
