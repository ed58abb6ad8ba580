package runtime

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/runtime/spec"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// screen is a terminal on which the test binary runs a program.
type screen struct {
	*testing.T
	master console.Console
	slave  *os.File
	cmd    *exec.Cmd
	seen   strings.Builder
}

func (m *machine) screen(what, id string) *screen {
	m.Helper()
	master, name, err := console.NewPty()
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { master.Close() })
	slave, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { slave.Close() })
	if err := master.Resize(console.WinSize{Height: 33, Width: 77}); err != nil {
		m.Fatal(err)
	}
	s := &screen{T: m.T, master: master, slave: slave, cmd: m.as(what, id, "")}
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = slave, slave, slave
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := s.cmd.Start(); err != nil {
		m.Fatal(err)
	}
	stop := time.AfterFunc(2*time.Minute, func() {
		_ = s.cmd.Process.Kill()
		fmt.Fprint(slave, "\nTIME OUT")
	})
	m.Cleanup(func() { stop.Stop() })
	return s
}

func (s *screen) expect(want string) {
	s.Helper()
	buf := make([]byte, 256)
	for !strings.Contains(s.seen.String(), want) {
		n, err := s.master.Read(buf)
		s.seen.Write(buf[:n])
		if err != nil || strings.Contains(s.seen.String(), "TIME OUT") {
			s.Fatalf("%v after %q", err, s.seen.String())
		}
	}
}

func (s *screen) types(keys string) {
	s.Helper()
	if _, err := s.master.Write([]byte(keys)); err != nil {
		s.Fatal(err)
	}
}

func (s *screen) ends(status int) {
	s.Helper()
	_ = s.cmd.Wait()
	if s.cmd.ProcessState.ExitCode() != status {
		s.Errorf("%v; saw %q", s.cmd.ProcessState, s.seen.String())
	}
}

// A user can attach to a detached container's terminal, detach by the keys and attach again, also several times at
// once. The terminal's size follows.
func TestAttachTerminal(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Terminal: true, Args: []string{"sh", "-c",
			"while read x; do case $x in size) stty size;; end) exit 5;; *) echo heard $x;; esac; done"}})
		c := m.detached(Record{ID: "test-attach"})
		one := m.screen("attach", c.ID)
		one.types("first\r")
		one.expect("heard first")
		one.types("size\r")
		one.expect("33 77")
		if err := one.master.Resize(console.WinSize{Height: 44, Width: 88}); err != nil {
			t.Fatal(err)
		}
		until(t, "another size", func() bool {
			one.types("size\r")
			time.Sleep(20 * time.Millisecond)
			return strings.Contains(m.log(c), "44 88")
		})
		before, err := unix.IoctlGetTermios(int(one.slave.Fd()), unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		one.types("\x10\x11")
		one.ends(0)
		after, err := unix.IoctlGetTermios(int(one.slave.Fd()), unix.TCGETS)
		if err != nil || after.Lflag&unix.ICANON == 0 || before.Lflag&unix.ICANON != 0 {
			t.Errorf("the terminal was not raw, or stays so: %x, then %x, %v", before.Lflag, after.Lflag, err)
		}
		if i := m.info(c); i.Status != Running {
			t.Errorf("it is %s", i.Status)
		}
		two, three := m.screen("attach", c.ID), m.screen("attach", c.ID)
		three.types("three\r")
		three.expect("heard three") // wait until the output has arrived
		two.types("again\r")
		two.expect("heard again")
		three.expect("heard again")
		exec := m.screen("exec", c.ID)
		if m.runtime == "runc" {
			exec.expect("33 77 0")
		} else {
			exec.expect("33 77") // crun sets the size after the process has started
		}
		exec.types("you\r")
		exec.expect("heard you")
		exec.ends(8)
		three.types("end\r")
		three.ends(5)
		two.ends(5)
		m.stopped(c)
		if _, err := c.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
	})
}
