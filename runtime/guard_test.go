package runtime

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
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/disk"
	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// left lists a container's processes, found by their arguments, cgroups and mounts on the host.
func (m *machine) left(id string, args ...string) (all []string) {
	m.Helper()
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if line := strings.TrimRight(string(b), "\x00"); err == nil && slices.Contains(args, strings.ReplaceAll(line, "\x00", " ")) {
			all = append(all, "process "+e.Name())
		}
	}
	mounts, _ := cgroupMounts()
	for _, c := range mounts {
		found, _ := filepath.Glob(filepath.Join(c.dir, c.own, "distkit-"+id+"-*"))
		all = append(all, found...)
		found, _ = filepath.Glob(filepath.Join(c.dir, defaultParent, "distkit-"+id+"-*"))
		all = append(all, found...)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		m.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, filepath.Join(m.state, "store")) {
			all = append(all, line)
		}
	}
	return all
}

// At whatever step a foreground run is killed, everything that it has started is ended without another call.
func TestRunKilled(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		for _, keep := range []bool{true, false} {
			for n, step := range []string{"started", "running", "ended", "removed", "unmounted", "recorded"} {
				name := fmt.Sprintf("keep %v, killed at %q", keep, step)
				duration := fmt.Sprintf("%d", 2000+n)
				args := []string{"sleep", duration}
				if n > 1 {
					args = []string{"true"}
				}
				m.spec(spec.Options{Args: args})
				c := m.snapshotted("test-killed", Record{RemoveAtEnd: !keep})
				if out, err := m.as("run", c.ID, step).CombinedOutput(); err == nil {
					t.Errorf("%s: it was not killed: %s", name, out)
				}
				until(t, name+": an end", func() bool {
					left := m.left(c.ID, "sleep "+duration)
					_, err := os.Stat(filepath.Join(m.state, "run", c.ID))
					return len(left) == 0 && errors.Is(err, fs.ErrNotExist)
				})
				if !keep {
					until(t, name+": its removal", func() bool { _, err := os.Stat(c.dir); return errors.Is(err, fs.ErrNotExist) })
					continue
				}
				until(t, name+": its lock", func() bool {
					lock, err := c.proc("").takeLock()
					if err == nil {
						_ = lock.Close()
					}
					return err == nil
				})
				if i := m.info(c); step == "started" && i.Status == Created {
					// Nothing has been recorded about the run yet.
				} else if i.Status != Stopped || i.Exit == nil {
					t.Errorf("%s: %+v", name, i)
				}
				if _, err := c.Remove(t.Context(), false); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	})
}

// The same at random moments. If the guard is killed too, the next call ends the container.
func TestRunKilledAnytime(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "sleep 2011 & exec sleep 2012"}})
		running := func() bool {
			return len(m.left("test-any", "sleep 2011", "sleep 2012")) == 2+len(existing(m.cgroups("test-any")))
		}
		for n := range 20 {
			c := m.command("test-any")
			c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			if n == 19 {
				until(t, "a container", running)
			} else {
				time.Sleep(time.Duration(n*15) * time.Millisecond)
			}
			_ = unix.Kill(-c.Process.Pid, unix.SIGKILL) // as timeout -k does
			_ = c.Wait()
			until(t, "an end", func() bool { return len(m.left("test-any", "sleep 2011", "sleep 2012")) == 0 })
		}
		c := m.command("test-any")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, "a container", running)
		guards := m.guards("test-any")
		if len(guards) != 1 {
			t.Fatalf("%d guards", len(guards))
		}
		_ = guards[0].signal(unix.SIGKILL)
		until(t, "the guard's end", func() bool { return !guards[0].Alive() })
		_ = c.Process.Kill()
		_ = c.Wait()
		m.containers().Clear(t.Context())
		if left := m.left("test-any", "sleep 2011", "sleep 2012"); len(left) > 0 {
			m.Errorf("%q", left)
		}
	})
}

// The same if the container's record is damaged, or the store has been removed.
func TestRunKilledWithoutRecord(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo ready; exec sleep 2013"}})
		run, _ := m.started("test-removed")
		m.removeStore()
		_ = run.Process.Kill()
		_ = run.Wait()
		until(t, "an end", func() bool {
			_, err := os.Stat(filepath.Join(m.state, "run", "test-removed"))
			return len(m.left("test-removed", "sleep 2013")) == 0 && errors.Is(err, fs.ErrNotExist)
		})

		c := m.snapshotted("test-broken", Record{})
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		run = m.as("run", c.ID, "")
		run.Stdout = w
		if err := run.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := io.ReadFull(r, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, c.path("container.json"), "{")
		_ = run.Process.Kill()
		_ = run.Wait()
		until(t, "an end", func() bool {
			_, err := os.Stat(filepath.Join(m.state, "run", c.ID))
			return len(m.left(c.ID, "sleep 2013")) == 0 && errors.Is(err, fs.ErrNotExist)
		})
		if c, err = m.bound().Any(c.ID); err == nil {
			_, err = c.Remove(t.Context(), false)
		}
		if err != nil {
			m.Error(err)
		}

		// A further process, too.
		c = m.detached(Record{ID: "test-removed"})
		x := m.as("exec-sleep", c.ID, "")
		x.Env = append(x.Env, "TEST_SCRIPT=echo ready")
		if r, w, err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		x.Stdout = w
		if err := x.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := io.ReadFull(r, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		m.removeStore()
		_ = x.Process.Kill()
		_ = x.Wait()
		until(t, "its end", func() bool { return len(m.left("none", "sleep 1001", "sleep 1002")) == 0 })
		s, err := readPrivateState(c.proc("").private)
		if s == nil || !s.Alive() {
			t.Fatalf("the container ended with it: %v", err)
		}
		_ = s.signal(unix.SIGKILL)
		until(t, "the container's end", func() bool {
			_, err := os.Stat(filepath.Join(m.state, "run", c.ID))
			return len(m.left(c.ID, "sleep 2013")) == 0 && errors.Is(err, fs.ErrNotExist)
		})
	})
}

// removeStore removes the store. It retries, because processes that are just starting may still write there.
func (m *machine) removeStore() {
	m.Helper()
	until(m.T, "the store is removed", func() bool { return os.RemoveAll(filepath.Join(m.state, "store")) == nil })
}

// cgroups returns the directories of a container's cgroups.
func (m *machine) cgroups(id string) []string {
	return slices.DeleteFunc(m.left(id), func(s string) bool { return !strings.HasPrefix(s, cgroupRoot) })
}

// guards lists the guards and shims of a container.
func (m *machine) guards(id string) (all []HostProcess) {
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		if b, _ := os.ReadFile(e); string(b) == shimName+"\x00"+id+"\x00" {
			pid := 0
			_, _ = fmt.Sscanf(e, "/proc/%d", &pid)
			if p, err := Identify(pid); err == nil && p.Alive() {
				all = append(all, p)
			}
		}
	}
	return all
}

// A further process in the foreground is ended with its caller, and the container continues.
func TestExecKilled(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "2021"}})
		c := m.detached(Record{ID: "test-exec-killed"})
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		x := m.as("exec-sleep", c.ID, "")
		x.Env = append(x.Env, "TEST_SCRIPT=echo ready")
		x.Stdout = w
		if err := x.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		if _, err := io.ReadFull(r, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		_ = x.Process.Kill()
		_ = x.Wait()
		until(t, "its end", func() bool { return len(m.left("none", "sleep 1001", "sleep 1002")) == 0 })
		until(t, "its directory's", func() bool { _, err := os.Stat(c.path("exec", "further")); return err != nil })
		if i := m.info(c); i.Status != Running {
			m.Errorf("%+v", i)
		}
		// Another process with the same ID waits for that.
		for range 5 {
			x := m.as("exec-sleep", c.ID, "running")
			x.Env = append(x.Env, "TEST_SCRIPT=:")
			if out, err := x.CombinedOutput(); err == nil {
				t.Errorf("it was not killed: %s", out)
			}
			id, err := c.StartExec(t.Context(), Exec{ID: "further", Args: []string{"sh", "-c", "exit 4"}})
			if err != nil {
				t.Fatalf("with the ID of one that is being ended: %v", err)
			}
			if e, err := c.proc(id).Wait(t.Context()); err != nil || e.Status == nil || *e.Status != 4 {
				t.Errorf("%+v %v", e, err)
			}
			if _, err := c.proc(id).Remove(t.Context(), false); err != nil {
				t.Error(err)
			}
		}
		// The same if its start was not recorded yet.
		for _, step := range []string{"started", "running"} {
			x := m.as("exec-sleep", c.ID, step)
			x.Env = append(x.Env, "TEST_SCRIPT=:")
			if out, err := x.CombinedOutput(); err == nil {
				t.Errorf("%s: it was not killed: %s", step, out)
			}
			until(t, step+": its end", func() bool { return len(m.left("none", "sleep 1001", "sleep 1002")) == 0 })
			until(t, step+": its directory's", func() bool { _, err := os.Stat(c.path("exec", "further")); return err != nil })
		}
		// A detached process whose shim is killed before it has reported the start is ended too.
		for _, step := range []string{"started", "running"} {
			if out, err := m.as("start-exec", c.ID, step).CombinedOutput(); err == nil {
				t.Errorf("%s: its shim was not killed: %s", step, out)
			}
			if left := m.left("none", "sleep 1001", "sleep 1002"); len(left) > 0 {
				t.Errorf("its shim killed at %q: %q", step, left)
			}
			if _, err := os.Stat(c.path("exec", "further")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("its shim killed at %q: its directory: %v", step, err)
			}
		}
		if _, err := c.Remove(t.Context(), true); err != nil {
			m.Error(err)
		}
	})
}

// Without its own PID namespace, a container's orphans are reaped by the run.
func TestRunReaps(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "(sh -c 'exit 3' & sh -c 'exit 4' &) ; sleep 0.2; echo ready; cat"}})
		config := filepath.Join(m.bundle, "config.json")
		b, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, config, strings.Replace(string(b), `{"type":"pid"},`, "", 1))
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		out, outw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		c := m.command("test-reaps")
		c.Stdin, c.Stdout = r, outw
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		outw.Close()
		if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		zombies := func() (all []string) {
			entries, _ := filepath.Glob("/proc/[0-9]*/status")
			for _, e := range entries {
				b, _ := os.ReadFile(e)
				if strings.Contains(string(b), fmt.Sprintf("\nPPid:\t%d\n", c.Process.Pid)) && strings.Contains(string(b), "\nState:\tZ") {
					all = append(all, e)
				}
			}
			return all
		}
		until(t, "no zombies", func() bool { return len(zombies()) == 0 })
		w.Close()
		if err := c.Wait(); err != nil {
			m.Error(err)
		}
	})
}

// A blocked signal counts as caught, since sigwait or signalfd may take it, as inits do.
func TestCatches(t *testing.T) {
	c := exec.Command("env", "--block-signal=TERM", "sleep", "1000")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	until(t, "sleep", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.Process.Pid))
		return string(b) == "sleep\n"
	})
	if sets := []string{"SigCgt", "SigBlk"}; !catches(c.Process.Pid, unix.SIGTERM, sets...) || catches(c.Process.Pid, unix.SIGINT, sets...) || catches(c.Process.Pid, unix.SIGTERM, "SigCgt") {
		t.Error("what is blocked is not told from what is not")
	}
}

// A runtime's start may wait for ever for a process that was killed. Clearing up ends it.
func TestClearEndsAStart(t *testing.T) {
	host, bin := t.TempDir(), t.TempDir()
	crun := filepath.Join(bin, "crun")
	if err := os.WriteFile(crun, []byte("#!/bin/sh\n[ \"$1\" = --root ] && exec rm -r \"$2/left\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(host, "crun", "left")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "exec.fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := claimID(t.Context(), host, "left", identity{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	working, err := os.OpenFile(c.path("working"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer working.Close()
	if err := disk.Lock(working, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	start := exec.CommandContext(t.Context(), "sh", "-c", `echo begins; echo 0 >"$0"`, filepath.Join(dir, "exec.fifo"))
	start.ExtraFiles = []*os.File{working}
	out, err := start.StdoutPipe()
	if err == nil {
		err = start.Start()
	}
	if err == nil {
		_, err = io.ReadFull(out, make([]byte, 7))
	}
	if err != nil {
		t.Fatal(err)
	}
	until(t, "it waits", func() bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", start.Process.Pid))
		_, state, _ := strings.Cut(string(b), ") ")
		return strings.HasPrefix(state, "S")
	})
	_ = working.Close()
	testenv.Write(t, c.path("pid"), "")
	if err := (&state{Runtime: crun}).clearHost(t.Context(), c, "left"); err != nil {
		t.Fatal(err)
	}
	if err := start.Wait(); err != nil {
		t.Errorf("the start: %v", err)
	}
}

// stuck is a Networks that can't remove networks.
type stuck struct{ removed int }

func (*stuck) Up(context.Context, string, *Connection) error { return nil }
func (*stuck) Connection(string) (*Connection, error)        { return nil, nil }
func (*stuck) Down(context.Context, string) error            { return nil }
func (s *stuck) Remove(context.Context, string) error        { s.removed++; return errors.New("it is stuck") }

// connected makes a container that is to be removed at its end, but has a network that can't be removed.
func connected(t *testing.T) (*Container, *stuck) {
	t.Helper()
	dir, networks := t.TempDir(), &stuck{}
	all, err := Open(filepath.Join(dir, "store"), "default", filepath.Join(dir, "state"), bound{}, networks)
	if err != nil {
		t.Fatal(err)
	}
	c, err := all.Create(t.Context(), Record{ID: "web", Bundle: dir, Network: "/networks/run.web", RemoveAtEnd: true}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, networks
}

// A guard does not retry after it has released its locks: the ID may have a new owner.
func TestGuardGivesTheLocksBackOnce(t *testing.T) {
	c, networks := connected(t)
	lock, err := c.proc("").takeLock()
	if err != nil {
		t.Fatal(err)
	}
	u := &execution{Process: c.proc(""), lock: lock}
	if u.claim, err = u.claimHost(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := u.clearKilled(t.Context()); err == nil || !strings.Contains(err.Error(), "it is stuck") {
		t.Errorf("%v", err)
	}
	if networks.removed != 1 {
		t.Errorf("tried %d times", networks.removed)
	}
}

// If the ID is in use by a container of another store, a run does not touch that one's network.
func TestABusyIDKeepsItsNetwork(t *testing.T) {
	c, networks := connected(t)
	if err := PrivateDir(c.set.state); err != nil {
		t.Fatal(err)
	}
	other, err := claimID(t.Context(), c.set.state, "web", identity{})
	if err != nil {
		t.Fatal(err)
	}
	defer other.close()
	if _, err := c.Run(t.Context(), &Runtime{command: "/bin/false", state: c.set.state}, Inherited); !errdefs.IsUnavailable(err) {
		t.Errorf("%v", err)
	}
	if networks.removed != 0 {
		t.Error("its network was removed")
	}
	if _, err := os.Stat(c.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the container is left: %v", err)
	}
}
