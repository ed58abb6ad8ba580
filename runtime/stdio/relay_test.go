package stdio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/runtime/internal/testenv"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// relayed runs a shell script with a relay between these files.
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
	defer runtime.KeepAlive([]*os.File{in, out, errs})
	return r.finish(signals, exitStatus(c.ProcessState))
}

// exitStatus returns a process's status, or 128+n if signal n killed it.
func exitStatus(p *os.ProcessState) int {
	if ws := unix.WaitStatus(p.Sys().(syscall.WaitStatus)); ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return p.ExitCode()
}

// fdOf returns a file's descriptor. os.File.Fd would make the descriptor blocking.
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
	return openFile(t, os.DevNull, flags)
}

func openFile(t *testing.T, name string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// filled returns a pipe that contains text.
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
			in := openFile(t, filepath.Join(dir, "in"), os.O_RDONLY)
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
			out, got := openFile(t, name, os.O_RDWR|os.O_CREATE), make(chan []byte, 1)
			read := func(f *os.File) {
				b, _ := io.ReadAll(f)
				got <- b
			}
			switch output {
			case "append":
				out = openFile(t, name, os.O_WRONLY|os.O_APPEND)
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

// socket returns one end of a connection. f handles the other end.
func socket(t *testing.T, f func(*os.File)) *os.File {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	go f(os.NewFile(uintptr(p[1]), "socket"))
	return os.NewFile(uintptr(p[0]), "socket")
}

// Input that the process has not read is left to the next reader.
func TestRelayLeavesWhatIsNotRead(t *testing.T) {
	name := filepath.Join(t.TempDir(), "in")
	testenv.Write(t, name, "1\n2\n3\n4\n")
	file := openFile(t, name, os.O_RDONLY)
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

// When the process ends, nothing waits for the rest of its input, of whatever type that is.
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
		"pipe": pipe, "terminal": openFile(t, name, os.O_RDWR|unix.O_NOCTTY), "zeros": openFile(t, "/dev/zero", os.O_RDONLY),
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
	full := openFile(t, "/dev/full", os.O_WRONLY)
	if _, err := relayed(t, in, full, null(t, os.O_WRONLY), nil, "echo x"); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "standard output") {
		t.Errorf("no room for output: %v", err)
	}
	if _, err := relayed(t, in, null(t, os.O_WRONLY), full, nil, "echo x >&2"); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "standard error") {
		t.Errorf("no room for errors: %v", err)
	}
	if _, err := relayed(t, in, in, null(t, os.O_WRONLY), nil, "echo x"); !errors.Is(err, unix.EBADF) {
		t.Errorf("not open for writing: %v", err)
	}
	if status, err := relayed(t, in, in, openFile(t, os.DevNull, os.O_RDONLY), nil, "exit 3"); status != 3 || err != nil {
		t.Errorf("not open for writing, and nothing to write: status %d, %v", status, err)
	}
	if _, err := relayed(t, openFile(t, t.TempDir(), os.O_RDONLY), null(t, os.O_WRONLY), null(t, os.O_WRONLY), nil, "cat"); !errors.Is(err, unix.EISDIR) {
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
	// Output to a reader that is already gone is lost, and the status is not 0.
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

// Processes left in the background do not delay the end, even if they print without end.
func TestRelayLeavesTheBackground(t *testing.T) {
	name := filepath.Join(t.TempDir(), "out")
	for _, background := range []string{"sleep 1000", "while echo more; do :; done", "sleep 0.2; echo later"} {
		out := openFile(t, name, os.O_CREATE|os.O_TRUNC|os.O_RDWR)
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

// After the process has ended, a signal terminates this process, even while a reader takes nothing.
func TestRelayObeysSignalsAtTheEnd(t *testing.T) {
	_, w := filled(t, strings.Repeat("x", 64<<10))
	signals := make(chan os.Signal, 1)
	signals <- unix.SIGTERM
	if status, err := relayed(t, null(t, os.O_RDONLY), w, null(t, os.O_WRONLY), signals, "echo x"); status != 128+int(unix.SIGTERM) || err != nil {
		t.Errorf("status %d, %v", status, err)
	}
}
