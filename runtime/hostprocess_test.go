package runtime

import (
	"io"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary as a program whose first thread exits while another continues until its input ends.
func init() {
	if os.Getenv("TEST_LEADER") == "" {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(9)
	}()
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0) // init runs on the first thread
}

// A process is alive as long as one of its threads is, although it shows as a zombie when the first has exited.
func TestAliveWithoutItsFirstThread(t *testing.T) {
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), "TEST_LEADER=yes")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill() })
	p, err := Identify(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the end of the first thread", func() bool {
		s, err := statOf(p.Pid)
		return err == nil && s.state == 'Z'
	})
	if !p.Alive() || p.ending() {
		t.Errorf("alive: %v, ending: %v", p.Alive(), p.ending())
	}
	in.Close()
	if err := unix.Waitid(unix.P_PID, p.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if p.Alive() || !p.ending() {
		t.Errorf("after its end alive: %v, ending: %v", p.Alive(), p.ending())
	}
	_ = c.Wait()
	if status := c.ProcessState.ExitCode(); status != 9 {
		t.Errorf("it ended with %d", status)
	}
}
