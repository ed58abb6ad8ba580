package runtime

import (
	"bufio"
	"os/exec"
	"strings"
	"testing"

	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

// initOf starts an init, which this program is too, with a command.
func initOf(args ...string) *exec.Cmd {
	c := exec.Command("/proc/self/exe")
	c.Args = append([]string{spec.InitPath}, args...)
	return c
}

// An init exits as its command does, and tells what it can't start.
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
		_ = unix.Kill(-c.Process.Pid, unix.SIGKILL) // what a container's end would end
		if got := c.ProcessState.ExitCode(); got != tt.want || (got == 126 || got == 127) != strings.HasPrefix(errs.String(), "init: ") {
			t.Errorf("%q: status %d, %q", tt.args, got, errs.String())
		}
	}
}

// An init forwards signals to its command, and waits for orphans.
func TestInitForwardsAndReaps(t *testing.T) {
	t.Parallel()
	for sig, want := range map[unix.Signal]int{unix.SIGTERM: 3, unix.SIGUSR1: 4} {
		// The orphan's own child is left to the init when the shell between them has ended.
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

// The command of an init is told of a supervisor's sockets by its own number.
func TestInitPassesSockets(t *testing.T) {
	t.Parallel()
	c := initOf("sh", "-c", `test $$ = $LISTEN_PID && echo "$0 $1 $LISTEN_FDS"`, "one", "two")
	c.Env = append(c.Environ(), "LISTEN_PID=1", "LISTEN_FDS=2")
	if out, err := c.Output(); string(out) != "one two 2\n" {
		t.Errorf("%q, %v", out, err)
	}
}
