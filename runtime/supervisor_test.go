package runtime

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

// supervised returns a run as a supervisor starts it, with variables for that very process.
func (m *machine) supervised(id string, variables string) *exec.Cmd {
	m.Helper()
	c := m.command(id)
	self, err := os.Executable()
	if err != nil {
		m.Fatal(err)
	}
	sh, err := exec.LookPath("sh")
	if err != nil {
		m.Fatal(err)
	}
	c.Path, c.Args = sh, []string{"sh", "-c", "export " + variables + `; exec "$0"`, self}
	return c
}

// A container gets a supervisor's sockets and nothing else. Sockets for another process are not passed on.
func TestSockets(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", `echo "$LISTEN_FDS $LISTEN_PID $LISTEN_FDNAMES"; for fd in 3 4 5 6 7 8 9 10 11 12; do (echo x >&$fd) 2>/dev/null && echo has $fd; done; exit 0`}})
		for _, tt := range []struct {
			variables, want string
			sockets         int
		}{
			{"LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=a:b", "2 1 a:b\nhas 3\nhas 4\n", 2},
			{"LISTEN_PID=1 LISTEN_FDS=2 LISTEN_FDNAMES=a:b", "  \n", 2},
			{"LISTEN_PID=$$ LISTEN_FDS=0", "  \n", 0},
		} {
			c := m.supervised("test-sockets", tt.variables)
			var out, errs bytes.Buffer
			c.Stdout, c.Stderr = &out, &errs
			for range tt.sockets {
				r, w, err := os.Pipe()
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				defer w.Close()
				c.ExtraFiles = append(c.ExtraFiles, w)
			}
			if err := c.Run(); err != nil || out.String() != tt.want {
				t.Errorf("%s: %v %q %s", tt.variables, err, out.String(), errs.String())
			}
		}
		for _, variables := range []string{"LISTEN_PID=$$ LISTEN_FDS=900", "LISTEN_PID=$$ LISTEN_FDS=-1", "LISTEN_PID=$$ LISTEN_FDS=99999", "LISTEN_PID=$$"} {
			if out, err := m.supervised("test-sockets", variables).CombinedOutput(); m.code(err) != 125 || !strings.Contains(string(out), "LISTEN_FDS") {
				t.Errorf("%s: %v %s", variables, err, out)
			}
		}
	})
}

// A supervisor is notified once the container runs, and not if it fails to run.
func TestTellsReadiness(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		name := filepath.Join(m.state, "..", "notify")
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: name})
		}
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, tt := range []struct{ command, want string }{{"true", "READY=1"}, {"/bin/data", ""}} {
			m.spec(spec.Options{Args: []string{tt.command}})
			out, err := m.supervised("test-ready", "NOTIFY_SOCKET="+name).CombinedOutput()
			if ok := err == nil; ok != (tt.want != "") {
				t.Errorf("%s: %v %s", tt.command, err, out)
			}
			b := make([]byte, 100)
			n, _ := unix.Read(fd, b)
			if got := string(b[:max(n, 0)]); got != tt.want {
				t.Errorf("%s: told %q", tt.command, got)
			}
			if n, _ := unix.Read(fd, b); n > 0 {
				t.Errorf("%s: told %q, too", tt.command, fmt.Sprintf("%.*s", n, b))
			}
		}
	})
}
