package runtime

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/events"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// containers opens the machine's store.
func (m *machine) containers() *Containers {
	m.Helper()
	all, err := Open(filepath.Join(m.state, "store"), "default", m.state, bound{}, nil)
	if err != nil {
		m.Fatal(err)
	}
	return all
}

func (m *machine) find() *Runtime {
	m.Helper()
	r, err := Find(m.runtime, m.state)
	if err != nil {
		m.Fatal(err)
	}
	return r
}

func (m *machine) finder(string) (*Runtime, error) { return m.find(), nil }

// detached starts the bundle detached.
func (m *machine) detached(rec Record) *Container {
	m.Helper()
	rec.Bundle = m.bundle
	c, _, err := m.containers().StartBundle(m.Context(), m.finder, rec)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { _, _ = c.Remove(m.Context(), true) })
	return c
}

// until waits until f returns true.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 12000 {
		if f() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("in vain: %s", what)
}

func (m *machine) info(c *Container) Info {
	m.Helper()
	i, err := c.Info()
	if err != nil {
		m.Fatal(err)
	}
	return i
}

func (m *machine) stopped(c *Container) Info {
	m.Helper()
	until(m.T, c.ID+" to stop", func() bool { return m.info(c).Status == Stopped })
	return m.info(c)
}

func TestDetached(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo out; echo err >&2; printf part; ls -l /proc/self/fd | grep -c -- '->'; exit 7"}})
		extra, err := os.Open(m.bundle) // as after 9<file in a shell
		if err != nil {
			t.Fatal(err)
		}
		defer extra.Close()
		c := m.detached(Record{ID: "test-detached", Labels: map[string]string{"a": "b"}})
		i := m.stopped(c)
		if i.Exit == nil || i.Exit.Status == nil || *i.Exit.Status != 7 || i.Exit.Exited.Before(i.Started) || i.Pid != 0 || !i.Detached || i.Labels["a"] != "b" {
			m.Errorf("%+v %+v", i, i.Exit)
		}
		var log []string
		b, err := os.ReadFile(c.path("log"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			_, rest, _ := strings.Cut(line, " ")
			log = append(log, rest)
		}
		got := strings.Join(log, "")
		for _, want := range []string{"stdout F out\n", "stderr F err\n", "stdout F 3\n"} {
			if !strings.Contains(got, want) && !strings.Contains(got, "stdout F part3\n") {
				m.Errorf("log has no %q: %q", want, got)
			}
		}
		l, err := events.Open(c.set.root)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var topics []string
		_ = l.Read(func(e events.Event, _ []byte) error {
			if e.Container == c.ID {
				topics = append(topics, e.Topic)
				if e.Topic == "/tasks/exit" && (e.Status == nil || *e.Status != 7 || e.Pid == 0) {
					m.Errorf("%+v", e)
				}
			}
			return nil
		})
		if strings.Join(topics, " ") != "/containers/create /tasks/start /tasks/exit" {
			m.Errorf("events %q", topics)
		}
		// The container can be run again.
		if _, err := c.Start(t.Context(), m.find()); err != nil {
			m.Error(err)
		}
		m.stopped(c)
		e, err := c.Remove(t.Context(), false)
		if err != nil || e == nil || *e.Status != 7 {
			m.Errorf("%+v %v", e, err)
		}

		// A failed start leaves nothing.
		m.spec(spec.Options{Args: []string{"/bin/data"}})
		_, _, err = m.containers().StartBundle(t.Context(), m.finder, Record{ID: "test-detached", Bundle: m.bundle, RemoveAtEnd: true})
		if ExitStatus(err) != 126 {
			m.Errorf("%v", err)
		}
		tmpfs, _ := spec.ParseTmpfs("/t")
		m.spec(spec.Options{Args: []string{"nope"}, Mounts: []specs.Mount{tmpfs}})
		_, _, err = m.containers().StartBundle(t.Context(), m.finder, Record{ID: "test-detached", Bundle: m.bundle, RemoveAtEnd: true})
		if ExitStatus(err) != 127 {
			m.Errorf("%v", err)
		}
	})
}

// A container's shim has only its own descriptors, and its log is bounded.
func TestShim(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exec sleep 1000"}})
		c := m.detached(Record{ID: "test-small", LogSize: 64 << 10})
		until(t, "the output", func() bool {
			b, _ := os.ReadFile(c.path("log"))
			return bytes.Contains(b, []byte("line 19999\n"))
		})
		var s state
		b, err := os.ReadFile(filepath.Join(c.proc("").private, "state.json"))
		if err == nil {
			err = json.Unmarshal(b, &s)
		}
		if err != nil {
			t.Fatal(err)
		}
		proc := "/proc/" + strconv.Itoa(s.Monitor.Pid)
		fds, _ := os.ReadDir(proc + "/fd")
		for _, fd := range fds {
			target, _ := os.Readlink(proc + "/fd/" + fd.Name())
			ok := target == "/dev/null" || strings.HasPrefix(target, "anon_inode:") || strings.HasPrefix(target, m.state) || strings.HasPrefix(target, "pipe:") || strings.HasPrefix(target, "/sys/fs/cgroup")
			if !ok {
				m.Errorf("the shim has %s open", target)
			}
		}
		for _, name := range []string{"log", "log.1"} {
			if fi, err := os.Stat(c.path(name)); err != nil || fi.Size() > 64<<10 {
				m.Errorf("%s: %v, or longer than the limit", name, err)
			}
		}
		if _, err := c.Remove(t.Context(), false); err == nil {
			m.Error("removed while it runs")
		}
		e, err := c.Remove(t.Context(), true)
		if err != nil || e == nil || e.Status == nil || *e.Status != 137 {
			m.Errorf("%+v %v", e, err)
		}
	})
}

// noted is a Networks that records what is removed.
type noted []string

func (n *noted) Up(context.Context, string, *Connection) error { return nil }
func (n *noted) Connection(string) (*Connection, error)        { return nil, nil }
func (n *noted) Down(context.Context, string) error            { return nil }

func (n *noted) Remove(_ context.Context, path string) error {
	*n = append(*n, path)
	if strings.HasPrefix(path, "/bad") {
		return errors.New("bad")
	}
	return nil
}

// A container's network is removed with it. If that fails, the container is kept.
func TestNetworkGoesWithTheContainer(t *testing.T) {
	var gone noted
	all, err := Open(t.TempDir(), "default", t.TempDir(), bound{}, &gone)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/good/netns", "", "/bad/netns"} {
		c, err := all.Create(t.Context(), Record{ID: "c", Network: path}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Remove(t.Context(), false); (err != nil) != (path == "/bad/netns") {
			t.Errorf("with network %q: %v", path, err)
		}
	}
	if !slices.Equal(gone, noted{"/good/netns", "/bad/netns"}) {
		t.Errorf("removed %q", gone)
	}
	if c, err := all.Get("c"); err != nil || c.Network != "/bad/netns" {
		t.Errorf("the one whose network stays: %+v, %v", c, err)
	}
}

// A further process that starts while the container is being removed either starts, or fails because there is no
// container. It leaves nothing.
func TestExecBesideTheEnd(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "0.1"}})
		var set string // the directory of the containers, which is removed with the last one
		for n := range 8 {
			c := m.detached(Record{ID: "test-beside-" + strconv.Itoa(n), RemoveAtEnd: true})
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					for {
						_, err := c.StartExec(t.Context(), Exec{Args: []string{"true"}})
						if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
							return
						}
						if err != nil {
							t.Errorf("neither begun nor too late: %v", err)
							return
						}
					}
				})
			}
			wg.Wait()
			set = filepath.Dir(c.dir)
			until(t, "the container is removed", func() bool {
				_, err := os.Stat(c.dir)
				return err != nil
			})
		}
		until(t, "its shims have ended", func() bool {
			left, _ := os.ReadDir(filepath.Join(m.state, "run"))
			_, err := os.Stat(set)
			return len(left) == 0 && err != nil
		})
	})
}

// startTo starts the bundle detached, with LogTo.
func (m *machine) startTo(id, to string) *Container {
	m.Helper()
	find := func(string) (*Runtime, error) {
		r := m.find()
		return r, r.LogTo(to)
	}
	c, _, err := m.containers().StartBundle(m.Context(), find, Record{ID: id, Bundle: m.bundle})
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { _, _ = c.Remove(m.Context(), true) })
	return c
}

// Output can go nowhere, or to a descriptor of the caller, instead of to a log.
func TestLogTo(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		noLog := func(c *Container) {
			t.Helper()
			p := c.proc("")
			if err := p.Logs(t.Context(), Logs{Tail: -1}, func(stdio.Entry) error { return nil }); !errdefs.IsFailedPrecondition(err) {
				m.Errorf("%s: logs: %v", c.ID, err)
			}
			if _, err := os.Lstat(c.path("log")); !errors.Is(err, fs.ErrNotExist) {
				m.Errorf("%s: log: %v", c.ID, err)
			}
		}
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 7"}})
		c := m.startTo("test-none", "none")
		if i := m.stopped(c); i.Exit == nil || *i.Exit.Status != 7 {
			m.Errorf("%+v", i.Exit)
		}
		noLog(c)
		made := []*Container{c}

		var fds [2]int
		if err := unix.Pipe(fds[:]); err != nil { // not close-on-exec, like a shell's
			t.Fatal(err)
		}
		r, w := os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "writer")
		defer r.Close()
		defer w.Close()
		for _, to := range []string{"all", "fd:", "fd:0", "fd:-1", "fd:60000", "fd:99999999", fmt.Sprint("fd:", fds[0])} {
			if err := m.find().LogTo(to); !errdefs.IsInvalidArgument(err) {
				m.Errorf("%s: %v", to, err)
			}
		}
		to := fmt.Sprint("fd:", fds[1])
		c = m.startTo("test-fd", to)
		m.stopped(c)
		noLog(c)
		made = append(made, c)
		lines := bufio.NewScanner(r)
		got := map[string]bool{}
		for range 2 {
			lines.Scan()
			got[lines.Text()] = true
		}
		if !got["out"] || !got["err"] {
			m.Errorf("the pipe has %v", got)
		}

		// A reader that goes away does not end the process. After its shim is killed, the output goes to a log again.
		m.spec(spec.Options{Args: []string{"sh", "-c", "while :; do echo tick; sleep 0.01; done"}})
		c = m.startTo("test-gone", to)
		made = append(made, c)
		lines.Scan()
		_ = r.Close()
		_ = w.Close()
		time.Sleep(50 * time.Millisecond)
		i := m.info(c)
		if i.Status != Running {
			m.Fatalf("%+v", i)
		}
		noLog(c)
		s, err := c.proc("").readState()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Monitor.signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, "the shim to end", func() bool { return !s.Monitor.Alive() })
		until(t, "a log", func() bool {
			ticks := 0
			err := c.proc("").Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error {
				if string(e.Text) == "tick\n" {
					ticks++
				}
				return nil
			})
			if err != nil && !errdefs.IsFailedPrecondition(err) {
				t.Fatal(err)
			}
			return ticks > 3
		})
		for _, c := range made {
			if _, err := c.Remove(t.Context(), true); err != nil {
				t.Error(err)
			}
		}
	})
}
