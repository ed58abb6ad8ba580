package cmd_test

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"distkit/cmd/internal/cli"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// No line of a listing is wider than the terminal, and only text reaches the terminal.
func TestListingsFitTheTerminal(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store := filepath.Join(dir, "store")
	manifest := fixture(t, dir, store)
	run := func(stdin, name string, args ...string) {
		t.Helper()
		if _, errs, status := execute(t, dir, store, stdin, name, args...); status != 0 {
			t.Fatalf("%s %q: status %d: %s", name, args, status, errs)
		}
	}
	long := "example.org/" + strings.Repeat("a-long-name/", 12) + "x:1"
	run("", "dist-image", "create", long, manifest)
	run("", "dist-image", "label", long, "note=\x1b[31mred 日本語")
	run("", "snap", "--snapshotter", "native", "prepare", "日本語日本語日本語 \x1b[31m"+strings.Repeat("key ", 30))
	run(`{"ociVersion":"1.0.2","process":{"args":["true"],"cwd":"/"},"root":{"path":"/"}}`, "task", "create", "--label", "note=日本語", "a-container-with-a-name-of-some-length")
	active := command(dir, store, "dist-ingest", strings.Repeat("日本語", 20))
	in, err := active.StdinPipe()
	if err == nil {
		err = active.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = in.Close(), active.Wait() }()

	for _, args := range [][]string{
		{"dist-image", "ls"}, {"dist-image", "tree", long}, {"dist-image", "du"}, {"dist-image", "target", long}, {"dist-image", "children", long},
		{"dist-image", "label", long}, {"dist-list"}, {"dist-active"}, {"dist-events"}, {"dist-tags", store}, {"dist-verify", "--names"}, {"dist-namespace", "ls"},
		{"dist-gc", "--dry-run", "--grace", "0"}, {"dist-doctor"}, {"dist-label", manifest}, {"dist-path", manifest},
		{"snap", "--snapshotter", "native", "ls"}, {"snap", "--snapshotter", "native", "tree"}, {"snap", "--snapshotter", "native", "usage"}, {"snap", "drivers"}, {"task", "ls", "-a"},
	} {
		for _, width := range []uint16{40, 80, 200} {
			text := onTerminal(t, dir, store, width, args[0], args[1:]...)
			for line := range strings.Lines(text) {
				line = strings.TrimRight(line, "\r\n")
				if n := cli.Columns(line); n > int(width) || cli.Printable(line) != line {
					t.Errorf("%q on %d columns: a line of %d: %q", args, width, n, line)
				}
			}
			if text == "" && args[1] != "children" && args[0] != "dist-label" {
				t.Errorf("%q on %d columns prints nothing", args, width)
			}
		}
	}
}

// onTerminal returns what a command writes to a terminal without colours.
func onTerminal(t *testing.T, dir, store string, columns uint16, name string, args ...string) string {
	t.Helper()
	pty, slave, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Close()
	tty, err := os.OpenFile(slave, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err == nil {
		err = unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns})
	}
	if err != nil {
		t.Fatal(err)
	}
	c := command(dir, store, name, args...)
	c.Env = append(c.Environ(), "NO_COLOR=1")
	c.Stdin, c.Stdout, c.Stderr = tty, tty, os.Stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	text, _ := io.ReadAll(pty) // reading ends with EIO when nobody has the terminal open
	_ = c.Wait()
	return string(text)
}
