package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"distkit/disk"
	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"github.com/containerd/console"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The test binary is also the program under test. A run inherits standard streams and becomes a subreaper, so it needs
// its own process.
func TestMain(m *testing.M) {
	Shim(func(root, namespace, state string) (*Containers, error) {
		return Open(root, namespace, state, bound{os.Getenv("TEST_SNAPSHOTS")}, nil)
	})
	if args := os.Getenv("TEST_RUN"); args != "" {
		f := strings.Split(args, "|") // runtime, state, id and bundle
		status := 125
		r, err := Find(f[0], f[1])
		if err == nil {
			err = r.CgroupParent(os.Getenv("TEST_PARENT"))
		}
		if err == nil {
			var all *Containers
			var c *Container
			if all, err = Open(filepath.Join(f[1], "store"), "default", f[1], bound{f[3]}, nil); err == nil && len(f) > 4 && f[4] != "create" {
				c, err = all.Get(f[2])
			}
			switch {
			case err != nil:
			case len(f) == 4:
				status, err = all.RunBundle(context.Background(), func(string) (*Runtime, error) { return r, nil }, Record{ID: f[2], Bundle: f[3], Namespaces: testJoins()}, testStreams())
			case f[4] == "create":
				self, _ := Identify(os.Getpid())
				rec := Record{ID: f[2], Snapshot: &Snapshot{Key: f[2]}, Owner: &self, RemoveAtEnd: os.Getenv("TEST_KEEP") == ""}
				_, err = all.Create(context.Background(), rec, "parent", func(*Container) error { return nil })
			case f[4] == "attach":
				var e *Exit
				if e, err = c.proc("").Attach(context.Background(), Attach{Input: true, DetachKeys: []byte{16, 17}}); err == nil && e != nil && e.Status != nil {
					status = *e.Status
				} else if err == nil {
					status = 0
				}
			case f[4] == "exec":
				status, err = c.Exec(context.Background(), Exec{Args: []string{"sh", "-c", "n=0; until s=$(stty size 2>/dev/null) && test -n \"$s\"; do n=1; done; echo $s $n; read x; echo heard $x; exit 8"}, Terminal: true})
			case f[4] == "execute":
				status, err = c.Exec(context.Background(), Exec{Args: []string{"sh", "-c", os.Getenv("TEST_SCRIPT")}, User: "1000", Streams: testStreams()})
			case f[4] == "exec-sleep":
				status, err = c.Exec(context.Background(), Exec{ID: "further", Args: []string{"sh", "-c", "sleep 1001 & " + os.Getenv("TEST_SCRIPT") + "; exec sleep 1002"}})
			case f[4] == "start-exec":
				_, err = c.StartExec(context.Background(), Exec{ID: "further", Args: []string{"sh", "-c", "sleep 1001 & exec sleep 1002"}})
				status = 0
			case f[4] == "start":
				_, err = c.Start(context.Background(), r)
				status = 0
			default:
				status, err = c.Run(context.Background(), r, testStreams())
			}
		}
		if err != nil {
			if !Told(err) {
				fmt.Fprintln(os.Stderr, "run:", err)
			}
			status = ExitStatus(err)
		}
		os.Exit(status)
	}
	if os.Getenv(onOtherHost) != "" {
		os.Exit(m.Run()) // started by a test that holds the lock
	}
	// Only one run of the tests at a time: they look for anything left in the host's cgroups.
	alone, err := disk.LockFile(context.Background(), filepath.Join(os.TempDir(), fmt.Sprintf("distkit-runtime-test-%d", os.Geteuid())), os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		panic(err)
	}
	// The key for the seals of this user's containers.
	dir, err := os.MkdirTemp("", "distkit-key-")
	if err != nil {
		panic(err)
	}
	if err := os.Setenv("XDG_STATE_HOME", dir); err != nil {
		panic(err)
	}
	status := m.Run()
	_ = os.RemoveAll(dir)
	disk.Release(alone)
	os.Exit(status)
}

// testStreams returns the streams for a run.
func testStreams() Streams {
	if os.Getenv("TEST_INHERIT") != "" {
		return Inherited
	}
	return Piped
}

// machine is a bundle with busybox, a state directory and a runtime.
type machine struct {
	*testing.T
	runtime, state, bundle string
}

// runtimes runs f for each runtime that is installed. A crun that refuses hybrid cgroups is run where it does not see
// them.
func runtimes(t *testing.T, f func(t *testing.T, m *machine)) {
	for _, name := range []string{"runc", "crun"} {
		if name == "crun" && os.Getenv(onOtherHost) != "" {
			break
		}
		t.Run(name, func(t *testing.T) {
			testenv.Require(t, "root")
			testenv.Require(t, name)
			testenv.Require(t, "busybox")
			command := name
			if b, err := os.ReadFile("/sys/fs/cgroup/unified/cgroup.controllers"); err == nil && len(b) > 1 && name == "crun" {
				command = filepath.Join(t.TempDir(), "crun")
				script := "#!/bin/sh\nexec unshare -m sh -c 'umount /sys/fs/cgroup/unified && exec /usr/bin/crun \"$@\"' crun \"$@\"\n"
				if err := os.WriteFile(command, []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			m := newMachine(t, command)
			f(t, m)
			m.clean()
		})
	}
}

func newMachine(t *testing.T, command string) *machine {
	t.Helper()
	m := &machine{t, command, filepath.Join(t.TempDir(), "s"), t.TempDir()}
	t.Cleanup(m.removeAll)
	busybox, _ := exec.LookPath("busybox")
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	testenv.Write(t, filepath.Join(m.bundle, "rootfs/bin/sh"), string(b))
	if err := os.Chmod(filepath.Join(m.bundle, "rootfs/bin/sh"), 0o755); err != nil {
		t.Fatal(err)
	}
	testenv.Write(t, filepath.Join(m.bundle, "rootfs/bin/data"), "no program")
	for _, a := range []string{"cat", "sleep", "stty", "ls", "true", "kill"} {
		if err := os.Symlink("sh", filepath.Join(m.bundle, "rootfs/bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// removeAll removes what a failed test has left.
func (m *machine) removeAll() {
	m.tell()
	left, err := m.containers().List(false)
	if err != nil {
		m.Error(err)
	}
	for _, c := range left {
		if _, err := c.Remove(context.Background(), true); err != nil {
			m.Error(err)
		}
	}
	m.containers().Clear(context.Background())
	until(m.T, "the end of shims and guards", func() bool { return len(m.attendants()) == 0 })
}

// tell logs what is left on the host after a failed test, to help to find the cause.
func (m *machine) tell() {
	if !m.Failed() {
		return
	}
	for _, pid := range m.attendants() {
		stack, _ := os.ReadFile("/proc/" + pid + "/stack")
		m.Logf("attendant %s waits in %q", pid, firstLine(string(stack)))
	}
	_ = filepath.WalkDir(filepath.Join(m.state, "run"), func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		m.Logf("%s: %.500q %v", name, b, err)
		return nil
	})
	out, err := exec.Command("ps", "-eo", "pid,ppid,sid,stat,etimes,wchan:20,args").CombinedOutput()
	if err != nil {
		m.Log(err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "sleep ") || strings.Contains(line, shimName) || strings.Contains(line, m.runtime) {
			m.Log(strings.TrimSpace(line))
		}
	}
}

// attendants lists the shims and guards of the machine's containers: processes that have a file in its state directory
// open.
func (m *machine) attendants() (pids []string) {
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range commands {
		if b, _ := os.ReadFile(name); !bytes.HasPrefix(b, []byte(shimName+"\x00")) {
			continue
		}
		open, _ := filepath.Glob(filepath.Join(filepath.Dir(name), "fd/*"))
		if slices.ContainsFunc(open, func(fd string) bool {
			file, _ := os.Readlink(fd)
			return strings.HasPrefix(file, m.state+"/")
		}) {
			pids = append(pids, filepath.Base(filepath.Dir(name)))
		}
	}
	return pids
}

// clean checks that nothing of any container is left.
func (m *machine) clean() {
	m.Helper()
	for _, dir := range []string{"run", "lock", filepath.Base(m.runtime), "store/containers"} {
		left, err := os.ReadDir(filepath.Join(m.state, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			m.Error(err)
		}
		for _, e := range left {
			m.Errorf("%s/%s is left behind", dir, e.Name())
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		m.Fatal(err)
	}
	for _, dir := range []string{m.bundle, m.state} {
		if bytes.Contains(mounts, []byte(dir)) {
			m.Errorf("mounts are left in %s", dir)
		}
	}
	if left := m.cgroups("test"); len(left) > 0 {
		m.Errorf("cgroups are left: %q", left)
	}
}

func (m *machine) spec(o spec.Options) {
	m.Helper()
	o.Host = spec.ThisHost()
	s, err := spec.New(&spec.Image{}, o)
	if err != nil {
		m.Fatal(err)
	}
	b, err := json.Marshal(s)
	if err != nil {
		m.Fatal(err)
	}
	testenv.Write(m.T, filepath.Join(m.bundle, "config.json"), string(b))
}

func (m *machine) command(id string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "TEST_RUN="+strings.Join([]string{m.runtime, m.state, id, m.bundle}, "|"))
	m.endWithTest(c)
	return c
}

// endWithTest kills a command at the end of the test, if it still runs.
func (m *machine) endWithTest(c *exec.Cmd) {
	m.Cleanup(func() {
		if c.Process != nil && c.ProcessState == nil {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	})
}

func (m *machine) run(stdin string) (stdout, stderr string, status int) {
	m.Helper()
	var out, errs bytes.Buffer
	c := m.command("test-" + NewID())
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &errs
	var exit *exec.ExitError
	if err := c.Run(); err != nil && !errors.As(err, &exit) {
		m.Fatal(err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

func TestRunStatus(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		tmpfs, _ := spec.ParseTmpfs("/t")
		for _, c := range []struct {
			o      spec.Options
			status int
			stderr string // a part of the expected text; "" means no output
		}{
			{spec.Options{Args: []string{"true"}}, 0, ""},
			{spec.Options{Args: []string{"sh", "-c", "exit 1"}}, 1, ""},
			{spec.Options{Args: []string{"sh", "-c", "exit 125"}}, 125, ""},
			{spec.Options{Args: []string{"sh", "-c", "exit 127"}}, 127, ""},
			{spec.Options{Args: []string{"sh", "-c", "exit 255"}}, 255, ""},
			{spec.Options{Args: []string{"nope"}}, 127, `run: command "nope": not found in the container`},
			{spec.Options{Args: []string{"/bin/nope"}}, 127, `run: command "/bin/nope": not found in the container`},
			{spec.Options{Args: []string{"/bin"}}, 126, `run: command "/bin": not executable`},
			{spec.Options{Args: []string{"data"}}, 126, `run: command "data": not executable`},
			{spec.Options{Args: []string{"sh"}, Env: []string{"PATH=/none"}}, 127, `not found`},
			{spec.Options{Args: []string{"nope"}, Mounts: []specs.Mount{tmpfs}}, 127, "nope"}, // reported by the runtime
			{spec.Options{Args: []string{"/bin"}, Mounts: []specs.Mount{tmpfs}}, 126, ""},
			{spec.Options{Args: []string{"true"}, Network: "/none/ns"}, 125, "/none/ns"},
		} {
			m.spec(c.o)
			_, errs, status := m.run("")
			if status != c.status || !strings.Contains(errs, c.stderr) || c.stderr == "" && status != 126 && errs != "" || strings.Count(errs, "\n") > 1 {
				m.Errorf("%q: status %d, not %d; stderr %q", c.o.Args, status, c.status, errs)
			}
		}
	})
}

func TestRunStreams(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "cat; echo e >&2"}})
		in := strings.Repeat("0123456789abcdef", 20000)
		if out, errs, status := m.run(in); out != in || errs != "e\n" || status != 0 {
			m.Errorf("%d bytes of %d came through; stderr %q; status %d", len(out), len(in), errs, status)
		}
		m.spec(spec.Options{Args: []string{"sh", "-c", "ls -l /proc/self/fd"}})
		if out, _, _ := m.run(""); strings.Contains(out, m.state) || strings.Count(out, "->") > 4 {
			m.Errorf("the container has descriptors of the host's: %s", out)
		}
		// If both streams are one file, the output keeps its order.
		m.spec(spec.Options{Args: []string{"sh", "-c", "for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done"}})
		var both bytes.Buffer
		c := m.command("test-streams")
		c.Stdout, c.Stderr = &both, &both
		if err := c.Run(); err != nil || both.String() != "o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\n" {
			m.Errorf("%q %v", both.String(), err)
		}
	})
}

// started runs the bundle with its output in a pipe, and reads the first line.
func (m *machine) started(id string) (*exec.Cmd, *os.File) {
	m.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { r.Close() })
	c := m.command(id)
	c.Stdout, c.Stderr = w, os.Stderr
	if err := c.Start(); err != nil {
		m.Fatal(err)
	}
	w.Close()
	if line := make([]byte, 6); true {
		if _, err := io.ReadFull(r, line); err != nil || string(line) != "ready\n" {
			m.Fatalf("%q %v", line, err)
		}
	}
	return c, r
}

func TestRunForwardsSignals(t *testing.T) {
	// Under nohup(1) the container would inherit an ignored SIGHUP, and shells can't trap signals ignored at their
	// start. A signal with a handler is reset on exec.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
	t.Cleanup(func() { signal.Reset(unix.SIGHUP) })
	runtimes(t, func(t *testing.T, m *machine) {
		for _, sig := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2} {
			m.spec(spec.Options{Args: []string{"sh", "-c", fmt.Sprintf("trap 'echo got; exit %d' %d; echo ready; while :; do sleep 0.1; done", 40+int(sig), int(sig))}})
			c, out := m.started("test-signals")
			if err := c.Process.Signal(sig); err != nil {
				m.Fatal(err)
			}
			rest, _ := io.ReadAll(out)
			_ = c.Wait()
			if string(rest) != "got\n" || c.ProcessState.ExitCode() != 40+int(sig) {
				m.Errorf("%v: %q %v", sig, rest, c.ProcessState)
			}
		}
		// The first process of a PID namespace has no handler, so the third signal kills it.
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo ready; exec sleep 1000"}})
		c, out := m.started("test-signals")
		done := make(chan error, 1)
		go func() { done <- c.Wait() }()
		for n := 0; ; n++ {
			_ = c.Process.Signal(unix.SIGTERM)
			select {
			case <-done:
			case <-time.After(50 * time.Millisecond): // a signal merges with a pending one
				continue
			}
			break
		}
		_, _ = io.ReadAll(out)
		if c.ProcessState.ExitCode() != 128+9 {
			m.Errorf("unheeded: %v", c.ProcessState)
		}
	})
}

func TestRunIDInUse(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo ready; cat"}})
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		out, outw, _ := os.Pipe()
		defer out.Close()
		c := m.command("test-use")
		c.Stdin, c.Stdout = r, outw
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		outw.Close()
		line := make([]byte, 6)
		if _, err := io.ReadFull(out, line); err != nil {
			t.Fatal(err)
		}
		second := m.command("test-use")
		b, err := second.CombinedOutput()
		if second.ProcessState.ExitCode() != 125 || !strings.Contains(string(b), "in use") || strings.Count(string(b), "\n") != 1 {
			m.Errorf("%q %v", b, err)
		}
		w.Close()
		if err := c.Wait(); err != nil {
			m.Error(err)
		}

		// The next run waits until what the killed one has started is ended.
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo ready; exec sleep 1000"}})
		c, _ = m.started("test-use")
		_ = c.Process.Kill()
		_ = c.Wait()
		m.spec(spec.Options{Args: []string{"sh", "-c", "exit 9"}})
		third := m.command("test-use")
		if b, _ := third.CombinedOutput(); third.ProcessState.ExitCode() != 9 {
			m.Errorf("%q %v", b, third.ProcessState)
		}
	})
}

func TestRunTerminal(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		master, name, err := console.NewPty()
		if err != nil {
			t.Fatal(err)
		}
		defer master.Close()
		slave, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer slave.Close()
		before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		if err := master.Resize(console.WinSize{Height: 33, Width: 77}); err != nil {
			t.Fatal(err)
		}
		m.spec(spec.Options{Terminal: true, Args: []string{"sh", "-c",
			"trap 'stty size' WINCH; stty size; test -t 0 && test -t 2 && echo tty; read x; echo got $x; until test \"$(stty size)\" = '44 88'; do sleep 0.05; done; echo resized; exit 5"}})
		c := m.command("test-terminal")
		c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		var seen strings.Builder
		expect := func(want string) {
			t.Helper()
			buf := make([]byte, 256)
			for !strings.Contains(seen.String(), want) {
				n, err := master.Read(buf)
				if err != nil {
					t.Fatalf("%v after %q", err, seen.String())
				}
				seen.Write(buf[:n])
			}
		}
		stop := time.AfterFunc(2*time.Minute, func() {
			_ = c.Process.Kill()
			fmt.Fprint(slave, "\nTIME OUT, 33 77 tty got hello resized")
		})
		defer stop.Stop()
		expect("33 77")
		expect("tty")
		fmt.Fprintf(master, "hello\r")
		expect("got hello")
		if err := master.Resize(console.WinSize{Height: 44, Width: 88}); err != nil {
			t.Fatal(err)
		}
		expect("resized")
		_ = c.Wait()
		if c.ProcessState.ExitCode() != 5 {
			t.Errorf("%v; saw %q", c.ProcessState, seen.String())
		}
		after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil || *after != *before {
			t.Errorf("terminal is not as it was: %+v, %+v %v", before, after, err)
		}

		// A terminal in the container, but a pipe on this side: its end becomes ^D.
		m.spec(spec.Options{Terminal: true, Args: []string{"cat"}})
		if out, _, status := m.run("piped\n"); status != 0 || strings.Count(out, "piped\n") != 2 {
			t.Errorf("%q %d", out, status)
		}
	})
}

func TestRunRefusesBundles(t *testing.T) {
	state := filepath.Join(t.TempDir(), "s")
	r := &Runtime{command: "/bin/false", state: state}
	all, err := Open(filepath.Join(state, "store"), "default", state, bound{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	find := func(string) (*Runtime, error) { return r, nil }
	process := `"process":{"args":["x"],"cwd":"/","env":["PATH=/bin"]}`
	for name, c := range map[string]struct {
		config string
		is     func(error) bool
		text   string
	}{
		"no config":   {"", errdefs.IsNotFound, "has no config.json"},
		"no json":     {"<html>", errdefs.IsInvalidArgument, "config.json"},
		"no process":  {`{"root":{"path":"rootfs"}}`, errdefs.IsInvalidArgument, "no process"},
		"no root":     {`{` + process + `}`, errdefs.IsInvalidArgument, "no root.path"},
		"root gone":   {`{` + process + `,"root":{"path":"gone"}}`, errdefs.IsNotFound, "no root filesystem at"},
		"root a file": {`{` + process + `,"root":{"path":"config.json"}}`, errdefs.IsNotFound, "no root filesystem at"},
		"source gone": {`{` + process + `,"root":{"path":"rootfs"},"mounts":[{"destination":"/x","type":"bind","source":"/no/such"}]}`, errdefs.IsNotFound, "no /no/such on this host"},
	} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "rootfs"), 0o755); err != nil {
			t.Fatal(err)
		}
		if c.config != "" {
			testenv.Write(t, filepath.Join(dir, "config.json"), c.config)
		}
		if _, err := all.RunBundle(t.Context(), find, Record{ID: "x", Bundle: dir}, Piped); !c.is(err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := all.RunBundle(t.Context(), find, Record{Bundle: "/no/such/bundle"}, Piped); !errdefs.IsNotFound(err) {
		t.Errorf("no bundle: %v", err)
	}
	if _, err := Find("no-such-runtime", state); !errdefs.IsNotFound(err) {
		t.Errorf("no runtime: %v", err)
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("a refused bundle made a state directory")
	}
}

// Of many runs that claim one ID, each either has it alone or is told that it is in use.
func TestClaim(t *testing.T) {
	state := t.TempDir()
	var holders, most, got atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				c, err := claimID(t.Context(), state, "x", identity{})
				if err != nil {
					if !errdefs.IsUnavailable(err) {
						t.Error(err)
					}
					continue
				}
				most.Store(max(most.Load(), holders.Add(1)))
				got.Add(1)
				testenv.Write(t, c.path("file"), "")
				holders.Add(-1)
				c.release()
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 || got.Load() == 0 {
		t.Errorf("%d held it at once, %d times", most.Load(), got.Load())
	}
	for _, dir := range []string{"run", "lock"} {
		if left, err := os.ReadDir(filepath.Join(state, dir)); err != nil || len(left) > 0 {
			t.Errorf("%v %v", left, err)
		}
	}
}

func TestCheckID(t *testing.T) {
	for _, id := range []string{"a", "0", "a-b", "a.b_c-d", strings.Repeat("x", 76), NewID()} {
		if err := CheckID(id); err != nil {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, id := range []string{"", "-a", "a-", "a--b", "a/b", "..", "a b", "ä", "a+b", strings.Repeat("x", 77), "a\n"} {
		if err := CheckID(id); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", id, err)
		}
	}
	if k, err := Key("default", "a"); k != "a" || err != nil {
		t.Errorf("%q %v", k, err)
	}
	if k, err := Key("n-s", "a"); k != "n-s+a" || err != nil {
		t.Errorf("%q %v", k, err)
	}
}
