package disk

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lockedBy makes a shell script lock the file, which is its descriptor 9, and returns the line that the script prints:
// the process that has the lock.
func lockedBy(t *testing.T, name, script string) (pid int) {
	t.Helper()
	for _, program := range []string{"sh", "flock"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	c := exec.Command("sh", "-c", script, name)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	c.ExtraFiles = []*os.File{f, f, f, f, f, f, f} // descriptor 9 is one of them
	c.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	t.Cleanup(func() {
		_ = unix.Kill(-c.Process.Pid, unix.SIGKILL)
		_ = c.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestHolders(t *testing.T) {
	for _, c := range []struct{ name, script, command string }{
		{"its process", "exec flock -n -F \"$0\" sh -c 'echo $$; exec sleep 1000'", "sleep"},
		// flock(1) has ended, but sleep has inherited the lock.
		{"an heir", "flock -n 9 || exit; sleep 1000 & exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; echo $!; wait", "sleep"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "file")
			pid := lockedBy(t, name, c.script)
			_, err := LockFile(t.Context(), name, os.O_RDWR, 0, unix.LOCK_EX|unix.LOCK_NB)
			want := fmt.Sprintf(`^busy: process %d \((%s|sh|flock)\)(, process \d+ \(\w+\))* ha(s|ve) it$`, pid, c.command)
			if !errdefs.IsUnavailable(err) || !errors.Is(err, unix.EWOULDBLOCK) || !regexp.MustCompile(want).MatchString(err.Error()) {
				t.Errorf("%v does not match %s", err, want)
			}
		})
	}
	// A shared lock has several holders. Each is named once.
	name := filepath.Join(t.TempDir(), "file")
	want := map[int]bool{}
	for range maxHolders + 2 {
		want[lockedBy(t, name, "exec flock -n -F -s \"$0\" sh -c 'echo $$; exec sleep 1000'")] = true
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range Holders(f) {
		if !want[p.PID] {
			t.Errorf("%s is no holder, or named twice", p)
		}
		delete(want, p.PID)
	}
	if len(want) != 0 {
		t.Errorf("not named: %v", want)
	}
	if text := holder(f); !regexp.MustCompile(`^process \d+ \(\w+\), process \d+ \(\w+\), process \d+ \(\w+\) and 2 others have it$`).MatchString(text) {
		t.Error(text)
	}
}

// A process chooses its own name, so it can't be trusted.
func TestNameOfAHolder(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	strange := filepath.Join(t.TempDir(), "a\x1b[2J\nb\xff")
	b, err := os.ReadFile(sleep)
	if err == nil {
		err = os.WriteFile(strange, b, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(strange, "1000")
	c.Args[0] = "sleep"
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	if p := process(c.Process.Pid); p.Command != "a?[2J?b?" {
		t.Errorf("%q", p.Command)
	}
}

func TestNoHolders(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if all := Holders(f); len(all) != 0 {
		t.Errorf("of a file that nobody has locked: %v", all)
	}
}
