package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// relayed runs a shell script through a relay between these files.
func relayed(t *testing.T, in, out, errs *os.File, signals <-chan os.Signal, script string) (status int, err error) {
	t.Helper()
	r, err := newRelay([3]int{fdOf(t, in), fdOf(t, out), fdOf(t, errs)})
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sh", "-c", script)
	r.Set(c)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	r.begin()
	_ = c.Wait()
	defer goruntime.KeepAlive([]*os.File{in, out, errs})
	return r.finish(signals, statusOf(unix.WaitStatus(c.ProcessState.Sys().(syscall.WaitStatus))))
}

// fdOf is a file's descriptor; os.File.Fd would make it one that blocks.
func fdOf(t *testing.T, f *os.File) (n int) {
	t.Helper()
	c, err := f.SyscallConn()
	if err == nil {
		err = c.Control(func(fd uintptr) { n = int(fd) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func null(t *testing.T, flags int) *os.File {
	t.Helper()
	return opened(t, os.DevNull, flags)
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

// filled is a pipe that holds something.
func filled(t *testing.T, text string) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	return r, w
}

func TestRelayMovesAll(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 200000)
	dir := t.TempDir()
	testenv.Write(t, filepath.Join(dir, "in"), string(data))
	for _, input := range []string{"file", "pipe", "socket"} {
		for _, output := range []string{"file", "append", "pipe", "socket", "nonblocking"} {
			name := filepath.Join(dir, input+output)
			in := opened(t, filepath.Join(dir, "in"), os.O_RDONLY)
			switch input {
			case "pipe":
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				go func() { _, _ = w.Write(data); w.Close() }()
				in = r
			case "socket":
				in = socket(t, func(f *os.File) { _, _ = f.Write(data); f.Close() })
			}
			out, got := opened(t, name, os.O_RDWR|os.O_CREATE), make(chan []byte, 1)
			read := func(f *os.File) {
				b, _ := io.ReadAll(f)
				got <- b
			}
			switch output {
			case "append":
				out = opened(t, name, os.O_WRONLY|os.O_APPEND)
			case "pipe", "nonblocking":
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				go read(r)
				out = w
			case "socket":
				out = socket(t, read)
			}
			fd := fdOf(t, out)
			_ = unix.SetNonblock(fd, output == "nonblocking")
			before, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
			status, err := relayed(t, in, out, null(t, os.O_WRONLY), nil, "cat; exit 4")
			after, _ := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
			out.Close()
			var all []byte
			if strings.HasPrefix(output, "file") || output == "append" {
				all, _ = os.ReadFile(name)
			} else {
				all = <-got
			}
			if status != 4 || err != nil || !bytes.Equal(all, data) || before != after {
				t.Errorf("%s to %s: status %d, %v; %d bytes of %d; flags %#o, %#o before", input, output, status, err, len(all), len(data), after, before)
			}
		}
	}
}

// socket returns one end of a connection; the other is handled by f.
func socket(t *testing.T, f func(*os.File)) *os.File {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	go f(os.NewFile(uintptr(p[1]), "socket"))
	return os.NewFile(uintptr(p[0]), "socket")
}

// What the process has not read is there for who reads next.
func TestRelayLeavesWhatIsNotRead(t *testing.T) {
	name := filepath.Join(t.TempDir(), "in")
	testenv.Write(t, name, "1\n2\n3\n4\n")
	file := opened(t, name, os.O_RDONLY)
	pipe, w := filled(t, "1\n2\n3\n4\n")
	w.Close()
	_ = unix.SetNonblock(int(pipe.Fd()), false)
	for _, in := range []*os.File{file, pipe} {
		for i, script := range []string{"read a; test $a = 1", "true", "exec <&-; sleep 0.1", "read a; test $a = 2"} {
			if status, err := relayed(t, in, null(t, os.O_WRONLY), null(t, os.O_WRONLY), nil, script); status != 0 || err != nil {
				t.Errorf("%s, %d: status %d, %v", in.Name(), i, status, err)
			}
		}
		if rest, err := io.ReadAll(in); string(rest) != "3\n4\n" || err != nil {
			t.Errorf("%s: left is %q, %v", in.Name(), rest, err)
		}
	}
}

// A process that ends does not wait for an input that goes on, whatever that is.
func TestRelayEndsBeforeItsInput(t *testing.T) {
	pipe, _ := filled(t, "")
	master, name, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	held := make(chan struct{})
	defer close(held)
	for what, in := range map[string]*os.File{
		"pipe": pipe, "terminal": opened(t, name, os.O_RDWR|unix.O_NOCTTY), "zeros": opened(t, "/dev/zero", os.O_RDONLY),
		"socket": socket(t, func(f *os.File) { <-held; f.Close() }), "write-only": null(t, os.O_WRONLY),
	} {
		_ = unix.SetNonblock(int(in.Fd()), false)
		if status, err := relayed(t, in, null(t, os.O_WRONLY), null(t, os.O_WRONLY), nil, "exit 3"); status != 3 || err != nil {
			t.Errorf("%s: status %d, %v", what, status, err)
		}
	}
}

func TestRelayTellsWhatIsNotWritten(t *testing.T) {
	in := null(t, os.O_RDONLY)
	full := opened(t, "/dev/full", os.O_WRONLY)
	if _, err := relayed(t, in, full, null(t, os.O_WRONLY), nil, "echo x"); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "standard output") {
		t.Errorf("no room for output: %v", err)
	}
	if _, err := relayed(t, in, null(t, os.O_WRONLY), full, nil, "echo x >&2"); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "standard error") {
		t.Errorf("no room for errors: %v", err)
	}
	if _, err := relayed(t, in, in, null(t, os.O_WRONLY), nil, "echo x"); !errors.Is(err, unix.EBADF) {
		t.Errorf("not open for writing: %v", err)
	}
	if _, err := relayed(t, opened(t, t.TempDir(), os.O_RDONLY), null(t, os.O_WRONLY), null(t, os.O_WRONLY), nil, "cat"); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a directory as input: %v", err)
	}
}

func TestRelayPassesABrokenPipeOn(t *testing.T) {
	closed := func() *os.File {
		r, w := filled(t, "")
		r.Close()
		return w
	}
	in := null(t, os.O_RDONLY)
	if status, err := relayed(t, in, closed(), null(t, os.O_WRONLY), nil, "while echo x; do :; done 2>/dev/null"); status == 0 || err != nil {
		t.Errorf("endless output: status %d, %v", status, err)
	}
	// What the process has written before it was known is lost, which is not success.
	r, w := filled(t, "")
	release := make(chan struct{})
	go func() {
		<-release
		r.Close()
	}()
	go func() { time.Sleep(100 * time.Millisecond); close(release) }()
	if status, err := relayed(t, in, w, null(t, os.O_WRONLY), nil, "head -c 300000 /dev/zero"); status != 128+int(unix.SIGPIPE) || err != nil {
		t.Errorf("output cut short: status %d, %v", status, err)
	}
}

// What is left behind in the background does not hold the end up, and endless output of it neither.
func TestRelayLeavesTheBackground(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	for _, background := range []string{"sleep 1000", "while echo more; do :; done", "sleep 0.2; echo later"} {
		out := opened(t, name, os.O_CREATE|os.O_TRUNC|os.O_RDWR)
		script := fmt.Sprintf("echo first; (%s) 2>/dev/null & echo $! >&2", background)
		pid, w := filled(t, "")
		status, err := relayed(t, null(t, os.O_RDONLY), out, w, nil, script)
		var n int
		if _, serr := fmt.Fscan(pid, &n); serr != nil {
			t.Fatal(serr)
		}
		_ = unix.Kill(n, unix.SIGKILL)
		b, _ := os.ReadFile(name)
		if status != 0 || err != nil || !strings.HasPrefix(string(b), "first\n") {
			t.Errorf("%s: status %d, %v; %.100q", background, status, err, b)
		}
		if strings.HasSuffix(background, "later") && string(b) != "first\nlater\n" {
			t.Errorf("what came soon is lost: %q", b)
		}
	}
}

// Once the process has ended, a signal is for this one: a reader may take nothing any more.
func TestRelayObeysSignalsAtTheEnd(t *testing.T) {
	_, w := filled(t, strings.Repeat("x", 64<<10))
	signals := make(chan os.Signal, 1)
	signals <- unix.SIGTERM
	if status, err := relayed(t, null(t, os.O_RDONLY), w, null(t, os.O_WRONLY), signals, "echo x"); status != 128+int(unix.SIGTERM) || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
}

// A container can neither own, reopen nor truncate what the streams of this process are.
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

// keepsFiles runs a command of a container's uid 1000 with files as its streams, and one of a terminal's.
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
		// What the container writes to its own input, it may read there.
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
	slave.Close() // reading ends with its last user
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

// A container has no descriptor of the caller's beside its streams, and those are the caller's where that was asked for.
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

// The input of a detached process is a pipe that nobody else can open, and not the FIFO that leads to it.
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
		if err := c.Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error { printed.Write(e.Text); return nil }); err != nil {
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
		r, w := filled(t, "")
		r.Close()
		c = m.command("test-closed")
		c.Stdout = w
		if err := c.Run(); c.ProcessState.ExitCode() != 128+int(unix.SIGPIPE) {
			t.Errorf("no reader: %v", err)
		}
	})
}
