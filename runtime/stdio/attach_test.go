package stdio

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestDetachKeys(t *testing.T) {
	keys, err := ParseDetachKeys("ctrl-p,ctrl-p,ctrl-q")
	if err != nil || string(keys) != "\x10\x10\x11" {
		t.Fatalf("%q %v", keys, err)
	}
	for _, c := range []struct {
		typed []string
		out   string
		left  bool
	}{
		{[]string{"abc"}, "abc", false},
		{[]string{"a\x10\x10\x11b"}, "a", true},
		{[]string{"a\x10", "\x10", "\x11"}, "a", true},
		{[]string{"\x10\x10\x10\x11"}, "\x10", true},
		{[]string{"\x10x\x10\x10\x10", "y"}, "\x10x\x10\x10\x10y", false},
	} {
		var out []byte
		matched, left := 0, false
		for _, s := range c.typed {
			var o []byte
			o, matched, left = detachKeys([]byte(s), keys, matched)
			out = append(out, o...)
		}
		if string(out) != c.out || left != c.left {
			t.Errorf("%q: %q %v", c.typed, out, left)
		}
	}
	for _, s := range []string{"ctrl-", "ctrl-1", "ab", ",", "ctrl-pp"} {
		if _, err := ParseDetachKeys(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// A console's socket works in a directory whose path is too long for a socket.
func TestLongSocketPath(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 200))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c, err := listen(filepath.Join(dir, "console"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	conn, err := net.Dial("unix", c.Path())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if _, err := os.Lstat(filepath.Join(dir, "console")); err != nil {
		t.Error(err)
	}
}

// detached starts a shell script with the streams of a detached process.
func detached(t *testing.T, o Options, script string) (*Detached, *exec.Cmd) {
	t.Helper()
	d, err := o.Open("")
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sh", "-c", script)
	d.Set(c)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	d.Begin()
	return d, c
}

// A detached process gets all input, and all of its output reaches the log and the attached readers.
func TestAttachAndLogMissNothing(t *testing.T) {
	t.Parallel()
	o := Options{Dir: t.TempDir(), Log: dir(t), Interactive: true}
	const lines = 20000
	d, c := detached(t, o, "cat; echo over >&2")
	w, err := Watch(o.Log.Tree.Path(o.Log.Name))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var typed strings.Builder
	for i := range lines {
		fmt.Fprintln(&typed, "line", i)
	}
	in := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(in, []byte(typed.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs := openFile(t, in+".out", os.O_RDWR|os.O_CREATE), openFile(t, in+".err", os.O_RDWR|os.O_CREATE)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = c.Wait()
		d.Settle()
		d.Close()
	}()
	a := Attach{Dir: o.Dir, Log: o.Log, Input: true, Own: Ends{openFile(t, in, os.O_RDONLY), out, errs}}
	left, err := a.Run(t.Context(), w, func() (bool, error) { return isClosed(ended), nil })
	if left || err != nil {
		t.Errorf("left %v, %v", left, err)
	}
	for name, want := range map[string]string{out.Name(): typed.String(), errs.Name(): "over\n"} {
		if got, err := os.ReadFile(name); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes of %d, %v", name, len(got), len(want), err)
		}
	}
	text, missing := all(t, o.Log)
	output, found := strings.CutSuffix(text, "over\n")
	if !found { // standard error is another pipe, so its copy may come before the end of standard output
		output = strings.Replace(text, "over\n", "", 1)
	}
	if len(text) != typed.Len()+len("over\n") || output != typed.String() || missing != 0 {
		t.Errorf("the log has %d bytes of %d, and says that %d are missing", len(text), typed.Len(), missing)
	}
}

// A process does not wait for attached readers. A slow reader is told how much it has missed, and still gets the end of
// the output.
func TestAttachTellsWhatIsMissing(t *testing.T) {
	t.Parallel()
	o := Options{Dir: t.TempDir(), Log: dir(t), LogSize: 4 << 10}
	d, c := detached(t, o, "i=0; while [ $i -lt 20000 ]; do echo a line of some length $i; i=$((i+1)); done")
	w, err := Watch(o.Log.Tree.Path(o.Log.Name))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ended, got := make(chan struct{}), make(chan string)
	go func() {
		_ = c.Wait()
		d.Settle()
		d.Close()
		close(ended)
		b, _ := io.ReadAll(r) // Read only now, after the process has ended.
		got <- string(b)
	}()
	a := Attach{Dir: o.Dir, Log: o.Log, Own: Ends{nil, out, out}}
	_, err = a.Run(t.Context(), w, func() (bool, error) { return isClosed(ended), nil })
	out.Close()
	text := <-got
	var missing Missing
	if !errors.As(err, &missing) || missing <= 0 {
		t.Errorf("%v, after %d bytes", err, len(text))
	}
	if !strings.HasSuffix(text, "\na line of some length 19999\n") {
		t.Errorf("the end is %q", text[max(0, len(text)-100):])
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// A monitor that replaces a killed one continues with the process's pipes.
func TestAdopt(t *testing.T) {
	t.Parallel()
	o := Options{Dir: t.TempDir(), Log: dir(t), Interactive: true}
	first, err := o.Open("")
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sh", "-c", "while read x; do echo heard $x; done")
	first.Set(c)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pipes := first.Pipes
	first.Ends.close() // as the death of a monitor closes them
	for _, f := range first.outputs {
		_ = f.Close()
	}
	first.Close()
	find := func(pipe string, mode int) (*os.File, error) {
		for fd := range 3 {
			name := fmt.Sprintf("/proc/%d/fd/%d", c.Process.Pid, fd)
			if got, err := os.Readlink(name); err == nil && got == pipe {
				return os.OpenFile(name, mode|unix.O_NONBLOCK, 0)
			}
		}
		return nil, nil
	}
	second, err := o.Adopt(pipes, find)
	if err != nil {
		t.Fatal(err)
	}
	_ = first.feed.Close() // Close only now, or the process may see the end of its input.
	second.Begin()
	a := Attach{Dir: o.Dir}
	if err := a.feed(strings.NewReader("you\n")); err != nil {
		t.Error(err)
	}
	a.control(strings.Repeat("x", 1000))
	a.control("eof")
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	second.Settle()
	second.Close()
	if text, _ := all(t, o.Log); text != "heard you\n" {
		t.Errorf("the log is %q", text)
	}
}
