package runtime

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/runtime/spec"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// initOf returns an init, for which the test binary also serves, with a command.
func initOf(args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Args = append([]string{spec.InitPath}, args...)
	return c
}

// An init exits with its command's status, and reports a command that it can't start.
func TestInitStatus(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args []string
		want int
	}{
		{[]string{"sh", "-c", "exit 7"}, 7},
		{[]string{"sh", "-c", "sleep 1000 2>/dev/null & exit 0"}, 0},
		{[]string{"sh", "-c", "kill -KILL $$"}, 137},
		{[]string{"no-such-command"}, 127},
		{[]string{"/no/such/command"}, 127},
		{[]string{"/etc/passwd"}, 126},
		{nil, 127},
	} {
		c := initOf(tt.args...)
		c.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
		var errs strings.Builder
		c.Stderr = &errs
		_ = c.Run()
		_ = unix.Kill(-c.Process.Pid, unix.SIGKILL) // normally killed when the container ends
		if got := c.ProcessState.ExitCode(); got != tt.want || (got == 126 || got == 127) != strings.HasPrefix(errs.String(), "init: ") {
			t.Errorf("%q: status %d, %q", tt.args, got, errs.String())
		}
	}
}

// An init forwards signals to its command, and reaps orphans.
func TestInitForwardsAndReaps(t *testing.T) {
	t.Parallel()
	for sig, want := range map[unix.Signal]int{unix.SIGTERM: 3, unix.SIGUSR1: 4} {
		// When the shell in between exits, the orphan's child becomes the init's.
		c := initOf("sh", "-c", `trap 'exit 3' TERM; trap 'exit 4' USR1
			orphan=$(sh -c 'sleep 0.01 >/dev/null & echo $!')
			while kill -0 $orphan 2>/dev/null; do sleep 0.01; done
			echo reaped; while :; do sleep 0.01; done`)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "reaped\n" {
			t.Errorf("%q, %v", line, err)
		}
		if err := c.Process.Signal(sig); err != nil {
			t.Error(err)
		}
		_ = c.Wait()
		if got := c.ProcessState.ExitCode(); got != want {
			t.Errorf("%v: status %d, want %d", sig, got, want)
		}
	}
}

// The command of an init gets a supervisor's sockets, with its own process number in the variables.
func TestInitPassesSockets(t *testing.T) {
	t.Parallel()
	c := initOf("sh", "-c", `test $$ = $LISTEN_PID && echo "$0 $1 $LISTEN_FDS"`, "one", "two")
	c.Env = append(c.Environ(), "LISTEN_PID=1", "LISTEN_FDS=2")
	if out, err := c.Output(); string(out) != "one two 2\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// A signal that is sent before the container's init handles signals still reaches the command.
func TestInitIsAwaited(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		o := spec.Options{Init: self, Args: []string{"sleep", "1000"}}
		for _, dir := range []string{"/lib", "/lib64", "/usr/lib"} { // this program may be linked to these libraries
			if _, err := os.Stat(dir); err == nil {
				o.Mounts = append(o.Mounts, specs.Mount{Destination: dir, Type: "bind", Source: dir, Options: []string{"rbind", "ro"}})
			}
		}
		m.spec(o)
		for range 5 {
			c := m.detached(Record{ID: "test-init"})
			if err := c.Stop(t.Context(), 0, 20*time.Second); err != nil {
				t.Error(err)
			}
			if i := m.info(c); i.Exit == nil || i.Exit.Status == nil || *i.Exit.Status != 128+15 {
				t.Errorf("stopped: %+v", i.Exit)
			}
			if _, err := c.Remove(t.Context(), false); err != nil {
				t.Error(err)
			}
		}
		for range 5 {
			c := m.command("test-init")
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "the begin of the run", func() bool {
				_, err := os.Stat(filepath.Join(m.state, "run/test-init/state.json"))
				return err == nil
			})
			if err := c.Process.Signal(unix.SIGTERM); err != nil {
				t.Error(err)
			}
			lost := time.AfterFunc(20*time.Second, func() { _ = c.Process.Kill() })
			_ = c.Wait()
			lost.Stop()
			if got := c.ProcessState.ExitCode(); got != 128+15 {
				t.Errorf("a run that was sent TERM at its begin: %v", c.ProcessState)
			}
		}
	})
}
