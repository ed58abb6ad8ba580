package runtime

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/console"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A container can't take over, reopen or truncate the files of this process's standard streams.
func TestRunKeepsTheCallersFiles(t *testing.T) {
	const script = `echo X > /proc/self/fd/0; cat; : > /proc/self/fd/1; echo bye; echo more > /proc/self/fd/2`
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{User: "1000", Args: []string{"sh", "-c", script}})
		run := func() *exec.Cmd { return m.command("test-files") }
		keepsFiles(t, run)
		m.spec(spec.Options{User: "1000", Terminal: true, Args: []string{"sh", "-c", "echo bye"}})
		keepsTerminal(t, run)

		m.spec(spec.Options{Args: []string{"sleep", "1000"}})
		all := m.containers()
		c, err := all.Create(t.Context(), Record{ID: "test-files", Bundle: m.bundle, RemoveAtEnd: true}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		r := &Runtime{command: m.runtime, state: m.state}
		if r, err = Find(m.runtime, m.state); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Start(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		keepsFiles(t, func() *exec.Cmd {
			x := m.command("test-files|" + m.bundle)
			x.Env = append(os.Environ(), "TEST_RUN="+strings.Join([]string{m.runtime, m.state, "test-files", m.bundle, "execute"}, "|"), "TEST_SCRIPT="+script)
			return x
		})
		if _, err := c.Remove(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	})
}

func opened(t *testing.T, name string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// keepsFiles runs a command as uid 1000 of a container, once with files as standard streams and once with a terminal.
func keepsFiles(t *testing.T, command func() *exec.Cmd) {
	t.Helper()
	dir := t.TempDir()
	name := func(n string) string { return filepath.Join(dir, n) }
	testenv.Write(t, name("in"), "input\n")
	testenv.Write(t, name("log"), "earlier\n")
	c := command()
	c.Stdin = opened(t, name("in"), os.O_RDONLY)
	c.Stdout = opened(t, name("log"), os.O_WRONLY|os.O_APPEND)
	c.Stderr = opened(t, name("err"), os.O_WRONLY|os.O_CREATE)
	if err := c.Run(); err != nil {
		t.Errorf("%v", err)
	}
	for n, want := range map[string]string{"in": "input\n", "log": "earlier\ninput\nbye\n", "err": "more\n"} {
		got, err := os.ReadFile(name(n))
		var st unix.Stat_t
		serr := unix.Stat(name(n), &st)
		// A process can read back what it writes to its own input.
		if err != nil || serr != nil || n != "in" && strings.Replace(string(got), "X\n", "", 1) != want || n == "in" && string(got) != want || st.Uid != 0 {
			t.Errorf("%s: %q, not %q; owner %d; %v", n, got, want, st.Uid, err)
		}
	}
	keepsTerminal(t, command)
}

func keepsTerminal(t *testing.T, command func() *exec.Cmd) {
	t.Helper()
	master, tty, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	slave := opened(t, tty, os.O_RDWR|unix.O_NOCTTY)
	c := command()
	c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close() // reading ends when the last user has closed it
	var seen []byte
	for b := make([]byte, 256); !bytes.Contains(seen, []byte("bye")); {
		n, err := master.Read(b)
		if seen = append(seen, b[:n]...); err != nil {
			t.Errorf("%v after %q", err, seen)
			break
		}
		_, _ = master.Write([]byte{4})
	}
	_ = c.Wait()
	var st unix.Stat_t
	if err := unix.Stat(tty, &st); err != nil || st.Uid != 0 {
		t.Errorf("the terminal's owner is %d, %v", st.Uid, err)
	}
}

// A container gets no descriptors of the caller except the standard streams, and the caller's own only on request.
func TestRunInheritsNoMore(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		dir := t.TempDir()
		out := opened(t, filepath.Join(dir, "out"), os.O_RDWR|os.O_CREATE)
		m.spec(spec.Options{Args: []string{"sh", "-c", "ls -l /proc/self/fd"}})
		for _, inherit := range []string{"", "yes"} {
			c := m.command("test-inherit")
			c.Env = append(c.Env, "TEST_INHERIT="+inherit)
			c.Stdout, c.ExtraFiles = out, []*os.File{opened(t, filepath.Join(dir, "secret"), os.O_RDWR|os.O_CREATE)}
			if err := c.Run(); err != nil {
				t.Error(err)
			}
			b, _ := os.ReadFile(out.Name())
			if strings.Contains(string(b), "secret") || strings.Contains(string(b), out.Name()) != (inherit != "") {
				t.Errorf("inherit %q: %s", inherit, b)
			}
			_ = out.Truncate(0)
			_, _ = out.Seek(0, 0)
		}
	})
}

// The input of a detached process is a pipe that nobody else can open, not the FIFO that feeds it.
func TestDetachedInputIsAPipe(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{User: "1000", Args: []string{"sh", "-c", "ls -l /proc/self/fd/0; cat; exit 6"}})
		c := m.detached(Record{ID: "test-input", Interactive: true})
		in := strings.Repeat("0123456789abcde\n", 20000)
		a := m.command("test-input")
		a.Env = append(os.Environ(), "TEST_RUN="+strings.Join([]string{m.runtime, m.state, "test-input", m.bundle, "attach"}, "|"))
		a.Stdin = strings.NewReader(in)
		if b, err := a.CombinedOutput(); a.ProcessState.ExitCode() != 6 {
			t.Errorf("%.300s %v", b, err)
		}
		var printed strings.Builder
		if err := c.proc("").Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error { printed.Write(e.Text); return nil }); err != nil {
			t.Error(err)
		}
		if first, rest, _ := strings.Cut(printed.String(), "\n"); !strings.Contains(first, "-> pipe:[") || rest != in {
			t.Errorf("input is %q; %d bytes of %d", first, len(rest), len(in))
		}
		if _, err := c.Remove(t.Context(), true); err != nil {
			t.Error(err)
		}
	})
}

func TestRunTerminalTellsWhatIsNotWritten(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Terminal: true, Args: []string{"sh", "-c", "echo x"}})
		var errs bytes.Buffer
		c := m.command("test-full")
		c.Stdout, c.Stderr = opened(t, "/dev/full", os.O_WRONLY), &errs
		if err := c.Run(); c.ProcessState.ExitCode() != 125 || !strings.Contains(errs.String(), "no space left") {
			t.Errorf("%v, %q", err, errs.String())
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		r.Close()
		c = m.command("test-closed")
		c.Stdout = w
		if err := c.Run(); c.ProcessState.ExitCode() != 128+int(unix.SIGPIPE) {
			t.Errorf("no reader: %v", err)
		}
	})
}

// The files of a stopped container are those of the directory that its record is sealed for, whatever the store's owner
// has put in its place since that was checked.
func TestFilesOfASwappedDirectory(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		outside := t.TempDir()
		testenv.Write(t, filepath.Join(outside, "mark"), "the host's")
		m.spec(spec.Options{Args: []string{"true"}})
		config, err := os.ReadFile(filepath.Join(m.bundle, "config.json"))
		if err != nil {
			t.Fatal(err)
		}
		plain, err := m.containers().Create(t.Context(), Record{ID: "test-plain"}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, plain.path("config.json"), string(config))
		for _, c := range []*Container{plain, m.snapshotted("test-snapshot", Record{})} {
			look := func(refused bool) {
				err := c.stoppedFiles(t.Context(), func(f Files) error {
					names, err := f.Root.Readdirnames(-1)
					if slices.Contains(names, "mark") {
						t.Errorf("%s: the host's files are shown", c.ID)
					}
					return err
				})
				if err != nil != refused || refused && !errdefs.IsFailedPrecondition(err) {
					t.Errorf("%s: %v", c.ID, err)
				}
			}
			look(false)
			if err := errors.Join(os.Rename(c.dir, c.dir+"-aside"), os.Mkdir(c.dir, 0o700), os.Symlink(outside, c.path("rootfs"))); err != nil {
				t.Fatal(err)
			}
			testenv.Write(t, c.path("config.json"), string(config))
			look(true)
			if err := errors.Join(os.RemoveAll(c.dir), os.Rename(c.dir+"-aside", c.dir)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Remove(t.Context(), true); err != nil {
				t.Error(err)
			}
		}
	})
}
