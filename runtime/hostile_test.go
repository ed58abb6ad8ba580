package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// stranger makes a container as another user's store may contain one.
func stranger(t *testing.T, all *Containers, id string, files map[string]string) *Container {
	t.Helper()
	dir := filepath.Join(all.dir(), id)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		testenv.Write(t, filepath.Join(dir, name), text)
	}
	c, err := all.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func openedStore(t *testing.T, n Networks) *Containers {
	t.Helper()
	all, err := Open(t.TempDir(), "default", filepath.Join(t.TempDir(), "state"), bound{}, n)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// With a store from a cloned repository, nothing is executed, killed or started.
func TestStrangersStore(t *testing.T) {
	var gone noted
	all := openedStore(t, &gone)
	mark := filepath.Join(t.TempDir(), "executed")
	program := filepath.Join(t.TempDir(), "build.sh")
	testenv.Write(t, program, "#!/bin/sh\ntouch "+mark+"\n")
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sleeper.Process.Kill(); _ = sleeper.Wait() }()
	victim, err := Identify(sleeper.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	dead := HostProcess{Pid: 1<<22 + 1, Boot: bootID()}
	b, err := json.Marshal(state{Status: Running, HostProcess: victim, Runtime: program, RuntimeState: all.state + "/runc", Detached: true, Monitor: dead,
		Cgroups: []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"}})
	if err != nil {
		t.Fatal(err)
	}
	creating, err := json.Marshal(state{Status: Creating, Runtime: program, RuntimeState: all.state + "/runc", Monitor: dead})
	if err != nil {
		t.Fatal(err)
	}
	record := `{"id":"x","runtime":"` + program + `","remove":true,"network":"/run/distkit/networks/db/netns","owner":{"pid":4194305,"start":1,"boot":"` + bootID() + `"}}`
	config := `{"process":{"args":["x"],"cwd":"/"},"root":{"path":"rootfs"},"hooks":{"prestart":[{"path":"` + program + `"}]}}`
	for id, s := range map[string]string{"running": string(b), "creating": string(creating)} {
		c := stranger(t, all, id, map[string]string{"container.json": record, "state.json": s, "config.json": config, "lock": "", "exit.json": " \n", "rootfs/x": ""})
		i, err := c.Info()
		if err != nil || i.Status != Stopped || i.Pid != 0 {
			t.Errorf("%s: it is %s, process %d: %v", id, i.Status, i.Pid, err)
		}
		all.Clear(t.Context())
		if _, err := all.Get(id); err != nil {
			t.Errorf("%s: a clearing took it: %v", id, err)
		}
		r := &Runtime{command: program, state: all.state}
		if _, err := c.Start(t.Context(), r); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "task trust") {
			t.Errorf("%s: start: %v", id, err)
		}
		if _, err := all.RunBundle(t.Context(), func(string) (*Runtime, error) { return r, nil }, Record{Bundle: c.Dir()}, Piped); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: run: %v", id, err)
		}
		if err := c.KillAll(t.Context(), unix.SIGKILL); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: kill: %v", id, err)
		}
		if _, err := all.Create(t.Context(), Record{ID: id}, "", nil); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s: create: %v", id, err)
		}
		if _, err := c.Remove(t.Context(), true); err != nil {
			t.Errorf("%s: remove: %v", id, err)
		}
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("the store's program was executed")
	}
	if !victim.Alive() {
		t.Error("a process that the store names was killed")
	}
	if len(gone) > 0 {
		t.Errorf("networks that the store names were removed: %q", gone)
	}
}

// A seal proves that this user made the container in this place, with these statements about the host. A copy has no
// valid seal.
func TestSeal(t *testing.T) {
	all := openedStore(t, &noted{})
	c, err := all.Create(t.Context(), Record{ID: "c", Network: "/networks/c/netns"}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	get := func(id string) *Container {
		t.Helper()
		c, err := all.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	if c := get("c"); !c.own || c.network() == "" {
		t.Error("what was made here is a stranger's")
	}
	if _, err := c.Label(map[string]string{"a": "b"}); err != nil || !get("c").own {
		t.Errorf("with another label it is a stranger's: %v", err)
	}
	b, err := os.ReadFile(c.path("container.json"))
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{
		"another network": strings.Replace(string(b), "/networks/c/", "/networks/d/", 1),
		"another bundle":  strings.Replace(string(b), `"id"`, `"bundle":"/","id"`, 1),
		"another runtime": strings.Replace(string(b), `"id"`, `"runtime":"/bin/sh","id"`, 1),
		"a network to be": strings.Replace(string(b), `"id"`, `"connection":{"name":"/etc/x"},"id"`, 1),
		"no seal":         strings.Replace(string(b), `"seal"`, `"x"`, 1),
	} {
		testenv.Write(t, c.path("container.json"), text)
		if c := get("c"); c.own || c.network() != "" {
			t.Errorf("with %s it is this user's own", what)
		}
	}
	testenv.Write(t, c.path("container.json"), string(b))
	// A copy, and a copy that replaces the original.
	if out, err := exec.Command("cp", "-a", c.dir, c.dir+"-copy").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if get("c-copy").own {
		t.Error("a copy is this user's own")
	}
	if err := errors.Join(os.Rename(c.dir, c.dir+"-old"), os.Rename(c.dir+"-copy", c.dir)); err != nil {
		t.Fatal(err)
	}
	if get("c").own || get("c-old").own {
		t.Error("a copy in the place, or what was moved away, is this user's own")
	}
	if err := get("c").Trust(); err != nil || !get("c").own {
		t.Errorf("after trust: %v", err)
	}
	// Another user's key, or no key.
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	if get("c").own {
		t.Error("with another key it is this user's own")
	}
}

// Root keeps no key in another user's directory, as XDG_STATE_HOME under sudo may name it. That user could replace the
// key.
func TestKeyOfRoot(t *testing.T) {
	testenv.Require(t, "root")
	home := t.TempDir()
	if err := os.Chown(home, 1000, 1000); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{home, filepath.Join(home, ".local/state")} {
		t.Setenv("XDG_STATE_HOME", dir)
		for _, name := range keyFiles("/state") {
			if strings.HasPrefix(name, home) {
				t.Errorf("XDG_STATE_HOME=%s: the key is in %s", dir, name)
			}
		}
	}
	own := t.TempDir()
	t.Setenv("XDG_STATE_HOME", filepath.Join(own, "state"))
	if names := keyFiles("/state"); names[0] != filepath.Join(own, "state/distkit/key") {
		t.Errorf("root's own is not used: %q", names)
	}
}

// No other user can access the directories of containers, whatever the umask was.
func TestClosedToOthers(t *testing.T) {
	all := openedStore(t, nil)
	old := unix.Umask(0)
	c, err := all.Create(t.Context(), Record{ID: "c"}, "", nil)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	mode := func(name string) os.FileMode {
		t.Helper()
		fi, err := os.Lstat(name)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode().Perm()
	}
	dirs := []string{filepath.Dir(all.dir()), all.dir(), c.dir}
	closed := func(when string) {
		t.Helper()
		for _, dir := range dirs {
			if mode(dir) != 0o700 {
				t.Errorf("%s %s has mode %o", when, dir, mode(dir))
			}
		}
	}
	closed("made")
	for _, name := range []string{"config.json", "container.json", "lock"} {
		if mode(c.path(name)) != 0o600 {
			t.Errorf("%s has mode %o", name, mode(c.path(name)))
		}
	}
	if os.Geteuid() == 0 {
		for dir := filepath.Dir(filepath.Dir(all.dir())); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"config.json", "rootfs"} {
			out, err := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "stat", c.path(name)).CombinedOutput()
			if err == nil || !strings.Contains(string(out), "Permission denied") {
				t.Errorf("another user reaches %s: %v %s", name, err, out)
			}
		}
	}
	// The next call that writes closes directories that an older version left open.
	for _, dir := range dirs {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Label(map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	closed("after a change")
	// A directory that others can write to is not this user's own.
	for _, dir := range dirs {
		if err := os.Chmod(dir, 0o775); err != nil {
			t.Fatal(err)
		}
		if _, err := all.Get("c"); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s is open to a group: %v", dir, err)
		}
		if _, err := all.Create(t.Context(), Record{ID: "d"}, "", nil); dir != c.dir && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s is open to a group: create: %v", dir, err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if os.Geteuid() != 0 {
			continue
		}
		if err := os.Chown(dir, 65534, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := all.Get("c"); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s is another user's: %v", dir, err)
		}
		if err := os.Chown(dir, 0, -1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Remove(t.Context(), true); err != nil {
		t.Error(err)
	}
}

// Roots of user namespaces, and nobody else, may search the directories that a container is started from.
func TestLetSearch(t *testing.T) {
	testenv.Require(t, "root")
	testenv.Require(t, "setpriv")
	t.Parallel()
	outer := filepath.Join(t.TempDir(), "outer")
	inner := filepath.Join(outer, "inner")
	if err := os.MkdirAll(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(outer); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []uint32{200000, 100000} {
		err := letSearch(&specs.Linux{UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: id, Size: 65536}}}, outer, inner)
		if errdefs.IsFailedPrecondition(err) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := privateState(outer); err != nil {
		t.Error(err)
	}
	// A change of the mode puts them out, and the next start of one of them lets them in again.
	if err := os.Chmod(outer, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := letSearch(&specs.Linux{UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}}, outer, inner); err != nil {
		t.Fatal(err)
	}
	for uid, may := range map[string]bool{"100000": true, "200000": true, "65534": false, "100001": false} {
		err := exec.Command("setpriv", "--reuid="+uid, "--regid="+uid, "--clear-groups", "stat", inner+"/.").Run()
		if (err == nil) != may {
			t.Errorf("user %s: %v", uid, err)
		}
	}
}

// Whatever replaces a container's file, it is not followed, waited for, or read without limit.
func TestUnfitFiles(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	for _, name := range []string{"container.json", "lock", "exit.json", "log", "config.json", "exec", "rootfs"} {
		for kind, put := range map[string]func(string) error{
			"a link outside":   func(n string) error { return os.Symlink(outside, n) },
			"a link to /":      func(n string) error { return os.Symlink("/", n) },
			"a link to itself": func(n string) error { return os.Symlink(n, n) },
			"a FIFO":           func(n string) error { return unix.Mkfifo(n, 0o600) },
			"a huge file": func(n string) error {
				return errors.Join(os.WriteFile(n, nil, 0o600), os.Truncate(n, 2<<30))
			},
		} {
			all := openedStore(t, nil)
			c, err := all.Create(t.Context(), Record{ID: "c"}, "", nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.RemoveAll(c.path(name)), put(c.path(name))); err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = all.List(false)
				all.Clear(t.Context())
				c, err := all.Any("c")
				if err != nil {
					return
				}
				_, _ = c.Info()
				_ = c.proc("").Logs(t.Context(), Logs{Tail: -1}, func(stdio.Entry) error { return nil })
				_, _ = c.Start(t.Context(), &Runtime{command: "/bin/false", state: all.state})
				_, _ = c.Remove(t.Context(), true)
			}()
			select {
			case <-done:
			case <-time.After(2 * time.Minute):
				t.Fatalf("%s is %s: stuck", name, kind)
			}
			if _, err := os.Lstat(outside); err == nil {
				t.Fatalf("%s is %s: it was followed", name, kind)
			}
		}
	}
}

// Removing a container that another process is making requires force.
func TestRemoveBesideItsOwner(t *testing.T) {
	all := openedStore(t, nil)
	owner := exec.Command("sleep", "1000")
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = owner.Process.Kill(); _ = owner.Wait() }()
	p, err := Identify(owner.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	c, err := all.Create(t.Context(), Record{ID: "c", Owner: &p}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Remove(t.Context(), false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("beside its owner: %v", err)
	}
	if _, err := c.Remove(t.Context(), true); err != nil {
		t.Errorf("by force: %v", err)
	}
}

// A process may print something before its monitor has recorded that it runs. A signal at that time is not refused.
func TestKillWhileCreating(t *testing.T) {
	all := openedStore(t, nil)
	c, err := all.Create(t.Context(), Record{ID: "c"}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sleeper.Process.Kill() }()
	self, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	process, err := Identify(sleeper.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p := c.proc("")
	if err := errors.Join(PrivateDir(all.state), os.MkdirAll(p.private, 0o700), p.writeState(state{Status: Creating, Monitor: self}), p.blankExit()); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	time.AfterFunc(50*time.Millisecond, func() { written <- p.writeState(state{Status: Running, Monitor: self, HostProcess: process}) })
	if err := c.proc("").Kill(t.Context(), unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	_ = sleeper.Wait()
	if status, ok := sleeper.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Errorf("%v", sleeper.ProcessState)
	}
}

// A running container is not started again, whether its shim is alive or not.
func TestStartOfWhatRuns(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "1000"}})
		c := m.detached(Record{ID: "test-runs"})
		before := m.info(c)
		for _, killed := range []bool{false, true} {
			if killed {
				l, err := c.proc("").look()
				if err != nil {
					t.Fatal(err)
				}
				if err := l.state.Monitor.signal(unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				until(t, "the shim's death", func() bool { return !l.state.Monitor.Alive() })
			}
			_, err := c.Start(t.Context(), m.find())
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "runs") {
				t.Errorf("shim killed %v: start: %v", killed, err)
			}
			if i := m.info(c); i.Status != Running || i.Pid != before.Pid {
				t.Errorf("shim killed %v: %s, process %d instead of %d", killed, i.Status, i.Pid, before.Pid)
			}
		}
		if !monitored(c) {
			t.Error("it has no other shim")
		}
		if _, err := c.Remove(t.Context(), true); err != nil {
			t.Error(err)
		}
	})
}

// remembering is a Networks that keeps the requests for its networks, until forget is called as at a boot.
type remembering struct {
	asked *Connection // nil after forget
	got   []*Connection
}

func (r *remembering) Up(_ context.Context, _ string, c *Connection) error {
	r.got = append(r.got, c)
	if r.asked == nil {
		r.asked = c
	}
	if r.asked == nil {
		return os.ErrNotExist
	}
	return nil
}
func (r *remembering) Connection(string) (*Connection, error) { return r.asked, nil }
func (r *remembering) Down(context.Context, string) error     { return nil }
func (r *remembering) Remove(context.Context, string) error   { return nil }

// The request for a container's network is in its record, and so survives a boot.
func TestNetworkAfterBoot(t *testing.T) {
	asked := &Connection{Name: "bridge", ConfDir: "/etc/cni/net.d", Ports: []string{"8080:80/tcp"}}
	n := &remembering{asked: asked}
	all := openedStore(t, n)
	c, err := all.Create(t.Context(), Record{ID: "c", Network: "/networks/c/netns"}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.asked = nil
	again, err := all.Get("c")
	if err != nil {
		t.Fatal(err)
	}
	if err := again.connect(t.Context()); err != nil || !reflect.DeepEqual(n.asked, asked) {
		t.Errorf("after a boot it is made as %+v: %v", n.asked, err)
	}
	// A stranger's record connects nothing.
	n.got = nil
	s := stranger(t, all, "s", map[string]string{"container.json": `{"network":"/networks/c/netns","connection":{"name":"/tmp/evil.conflist"}}`})
	if err := s.connect(t.Context()); err != nil || len(n.got) > 0 {
		t.Errorf("a stranger's network was connected: %v %v", n.got, err)
	}
}
