// Package hostile runs every command on stores that strangers have prepared: each file and directory of the layout is
// replaced in turn by something else. The commands run as root and as an ordinary user.
//
// On such a store a command may succeed, or fail with one line and a documented exit status. It must not change or
// execute anything outside the store, touch other processes, leave a process, mount or cgroup behind, hang, need much
// memory, or crash.
package hostile

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"distkit/testdata/fixture"
)

const (
	patience  = 30 * time.Second // many times what a command takes
	maxMemory = 96 << 20
	other     = 65534 // the ordinary user, who also owns the stores that belong to another user
)

// long reports whether every command runs on every case that concerns it: HOSTILE=all (make hostile).
func long() bool { return os.Getenv("HOSTILE") == "all" }

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv("HOSTILE_MOUNTS") == "" {
		os.Exit(inOwnMounts())
	}
	// Processes that commands leave running become children of this process, which ends them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fixture.Main(m)
}

// inOwnMounts runs this program again in a mount namespace of its own, so that every new mount there was made by a
// command.
func inOwnMounts() int {
	runtime.LockOSThread() // the child waits for this thread to end
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), "HOSTILE_MOUNTS=own")
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := c.Run()
	if c.ProcessState == nil || c.ProcessState.ExitCode() < 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return c.ProcessState.ExitCode()
}

// TestStores runs the cases. Without HOSTILE it runs a sample that is the same each time, of commands with cases that
// concern them. HOSTILE=REGEXP runs those whose name matches, "PATH: CASE: COMMAND".
func TestStores(t *testing.T) {
	type as struct {
		name       string
		uid, owner int
		runs       int // in the sample
	}
	users := []as{{"user", os.Geteuid(), os.Geteuid(), 1200}}
	if os.Geteuid() == 0 {
		users = []as{{"root", 0, 0, 1100}, {"root_in_anothers", 0, other, 400}, {"user", other, other, 800}}
	}
	for _, u := range users {
		t.Run(u.name, func(t *testing.T) {
			s := newStage(t, u.uid, u.owner)
			all := s.cases(t)
			done := 0
			if u.uid == u.owner { // otherwise the rest might prove nothing
				s.tryUnchanged(t)
			}
			run := func(c hostileCase, cmd command) {
				s.try(t, c, cmd)
				done++
			}
			switch wanted := os.Getenv("HOSTILE"); wanted {
			case "":
				for n := range u.runs {
					c := all[n*len(all)/u.runs]
					cmd := s.commands[n%len(s.commands)]
					for k := n; !cmd.concerns(c.path); k++ {
						cmd = s.commands[k*7%len(s.commands)]
					}
					run(c, cmd)
				}
			default:
				names := regexp.MustCompile(wanted)
				for _, c := range all {
					for _, cmd := range s.commands {
						if wanted == "all" && cmd.concerns(c.path) || names.MatchString(title(c, cmd)) {
							run(c, cmd)
						}
					}
				}
			}
			t.Logf("%d cases, %d commands, %d runs", len(all), len(s.commands), done)
		})
	}
}

func title(c hostileCase, cmd command) string { return fmt.Sprintf("%q: %s: %s", c.path, c.name, cmd) }

// stage is a prepared store with its environment.
type stage struct {
	uid, owner int
	dir        string // contains all of the following
	pristine   string // the store as distkit made it
	work       string // where commands run: the store under test is its .content
	outside    string // must not change
	private    string // the user's own directories: HOME, TMPDIR and so on
	env        []string
	id         string   // of the container in the store; no other container on this machine has it
	image      []string // the digests of the config, the manifest and the index, if there is one
	drivers    []string // of which the store has snapshots
	commands   []command
	canary     *exec.Cmd // a process that no command may touch
}

func newStage(t *testing.T, uid, owner int) *stage {
	top := fixture.Dir
	if unix.Access("/dev/shm", unix.W_OK) == nil { // the test makes many small files
		top = "/dev/shm"
	}
	dir, err := os.MkdirTemp(top, "hostile-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	canary := exec.Command("sleep", "infinity")
	canary.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := canary.Start(); err != nil {
		t.Fatal(err)
	}
	s := &stage{
		uid: uid, owner: owner, dir: dir, pristine: dir + "/pristine", work: dir + "/work", outside: dir + "/outside", private: dir + "/private",
		id: fmt.Sprintf("hostile%d", os.Getpid()), canary: canary,
	}
	w, err := fixture.NewWorld(filepath.Join(fixture.Dir, filepath.Base(dir)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.Close()
		thaw(s.cgroups())
		s.reap(0)
		_ = canary.Process.Kill()
		_ = canary.Wait()
		if err := errors.Join(removeCgroups(s.cgroups()), fixture.Unmount(dir), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	for _, d := range []string{s.pristine, s.outside, s.outside + "/dir", s.private} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.env = append(w.Vars, "HOME="+s.private, "XDG_RUNTIME_DIR="+s.private+"/run", "XDG_STATE_HOME="+s.private+"/state",
		"DIST_STATE="+s.private+"/run/distkit", "TMPDIR="+s.private+"/tmp", "EDITOR=true")
	for name, text := range map[string]string{"file": "canary\n", "dir/file": "canary\n", "evil": "#!/bin/sh\ntouch " + s.outside + "/executed\n"} {
		if err := os.WriteFile(filepath.Join(s.outside, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.clear(); err != nil {
		t.Fatal(err)
	}
	s.prepare(t)
	// The sample shows that snapshots have lost their owners, and they are refused. It is removed if the store gets another owner.
	if owner != os.Geteuid() {
		for _, driver := range s.drivers {
			if err := os.RemoveAll(filepath.Join(s.pristine, ".content", "snapshots", driver, "sample")); err != nil {
				t.Fatal(err)
			}
		}
		if err := chown(s.pristine, owner); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(chown(s.outside, uid), chown(s.private, uid)); err != nil {
		t.Fatal(err)
	}
	return s
}

func chown(dir string, owner int) error {
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return os.Lchown(path, owner, owner)
	})
}

// tryUnchanged runs each command on the unchanged store, where all but a few succeed.
func (s *stage) tryUnchanged(t *testing.T) {
	nothing := hostileCase{path: "x", name: "nothing", change: func(*stage, string) error { return nil }}
	for _, cmd := range s.commands {
		status, text := s.try(t, nothing, cmd)
		if !cmd.unsure && (status == 0) == cmd.fails {
			t.Errorf("unchanged: %s: status %d: %s", cmd, status, text)
		}
	}
}

// try runs one command on one changed store, and returns its exit status and its standard error.
func (s *stage) try(t *testing.T, c hostileCase, cmd command) (status int, text string) {
	name := title(c, cmd)
	if cmd.running && c.name == "link to what was there" && strings.HasPrefix(c.path, "containers") {
		return 0, "" // its monitor has the log open, and may go on writing to it
	}
	if err := s.fresh(c, cmd); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	before := fingerprint(t, s.outside)
	run := s.command(cmd.name, cmd.args...)
	if cmd.in != "" {
		in, err := os.Open(filepath.Join(s.work, cmd.in))
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		run.Stdin = in
	}
	run.WaitDelay = time.Second
	var out, errs limited
	run.Stdout, run.Stderr = &out, &errs
	if err := run.Start(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	var stuck atomic.Bool
	timer := time.AfterFunc(patience, func() { stuck.Store(true); _ = unix.Kill(-run.Process.Pid, unix.SIGKILL) })
	_ = run.Wait()
	timer.Stop()
	state := run.ProcessState
	status = state.ExitCode()
	if stuck.Load() {
		t.Errorf("%s: hangs", name)
	} else if status < 0 || status > 10 && (status < 125 || status > 127) && !cmd.passes {
		t.Errorf("%s: %v, %s", name, state, errs.text)
	} else if complaint := badMessage(status, cmd.passes, out.text, errs.text); complaint != "" {
		t.Errorf("%s: status %d, %s: %q", name, status, complaint, errs.text)
	}
	if used := state.SysUsage().(*syscall.Rusage).Maxrss << 10; used > maxMemory {
		t.Errorf("%s: %d MiB of memory", name, used>>20)
	}
	if cpu := state.UserTime() + state.SystemTime(); cpu > patience {
		t.Errorf("%s: %v of processor time", name, cpu)
	}
	s.checkLeft(t, name, cmd, before, errs.text)
	if stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.canary.Process.Pid)); !bytes.Contains(stat, []byte(") S ")) {
		t.Fatalf("%s: a foreign process was killed or stopped: %s", name, stat)
	}
	return status, errs.text
}

// checkLeft reports everything that a command has changed outside the store or left behind, except what the command
// said that it keeps, and removes it.
func (s *stage) checkLeft(t *testing.T, name string, cmd command, before, said string) {
	var groups []string
	if cmd.runs {
		groups = s.cgroups()
		thaw(groups)
	}
	grace := 2 * time.Second // for processes that are about to end
	if cmd.left {
		grace = 0
	}
	if left := s.reap(grace); len(left) > 0 && !cmd.left {
		t.Errorf("%s: processes are left: %q", name, left)
	}
	if after := fingerprint(t, s.outside); after != before {
		t.Errorf("%s: outside of the store\n%swas changed to\n%s", name, before, after)
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(info)) {
		f := strings.Fields(line)
		if !strings.HasPrefix(f[4], s.dir+"/") {
			continue
		}
		if !cmd.left {
			t.Errorf("%s: a mount is left: %s", name, line)
		}
		// The source of the mount: the root within the file system, and the layers of an overlay.
		if cmd.running {
			continue // it was mounted before
		}
		if strings.Contains(f[3], "/outside") || strings.Contains(f[len(f)-1], "outside") {
			t.Errorf("%s: what is outside of the store is mounted: %s", name, line)
		}
	}
	if err := fixture.Unmount(s.dir); err != nil {
		t.Fatal(err)
	}
	if len(groups) > 0 && !cmd.left {
		t.Errorf("%s: cgroups are left: %q", name, groups)
	}
	if err := removeCgroups(groups); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	files, _ := filepath.Glob(s.private + "/tmp/*")
	for _, f := range files {
		if !strings.Contains(said, "is kept in "+f) {
			t.Errorf("%s: a file is left in TMPDIR: %q", name, f)
		}
		if err := os.RemoveAll(f); err != nil {
			t.Fatal(err)
		}
	}
}

// fresh makes the store under test: a copy of the prepared one, with the change. Files that an earlier one had outside
// are removed.
func (s *stage) fresh(c hostileCase, cmd command) error {
	if err := s.clear(); err != nil {
		return err
	}
	if out, err := exec.Command("cp", "-a", "--", s.pristine, s.work).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	// A hostile store might name executables by a relative path, so the working directory has some.
	if err := os.WriteFile(filepath.Join(s.work, "build.sh"), []byte("#!/bin/sh\ntouch "+s.outside+"/executed\n"), 0o755); err != nil {
		return err
	}
	// A container of another user's store is not started. This one belongs to the user, but then other files in the
	// store differ.
	if cmd.running || cmd.runs && s.owner == s.uid && !strings.HasPrefix(c.path, "containers") {
		if err := s.succeed("task", "trust", s.id, s.id+".sleeps"); err != nil {
			return err
		}
	}
	if cmd.running {
		if err := s.succeed("task", "start", s.id+".sleeps"); err != nil {
			return err
		}
	}
	path := filepath.Join(s.work, ".content", c.path)
	if err := c.change(s, path); err != nil && !(cmd.running && errors.Is(err, unix.EBUSY)) { // nobody can replace a mount point
		return err
	}
	if s.owner == os.Geteuid() {
		return nil
	}
	return chown(s.work, s.owner)
}

// clear removes the files of the run before.
func (s *stage) clear() error {
	for _, d := range []string{s.work, s.outside + "/moved", s.outside + "/created", s.outside + "/executed", s.private + "/run", s.private + "/tmp"} {
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	for _, d := range []string{s.private + "/run", s.private + "/tmp"} {
		if err := errors.Join(os.Mkdir(d, 0o700), os.Lchown(d, s.uid, s.uid)); err != nil {
			return err
		}
	}
	return nil
}

// command returns a command that runs in the working directory, as the user.
func (s *stage) command(name string, args ...string) *exec.Cmd {
	if path := filepath.Join(fixture.Bin, name); unix.Access(path, unix.X_OK) == nil {
		name = path
	}
	c := exec.Command(name, args...)
	c.Dir, c.Env = s.work, s.env
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() != s.uid {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.uid), Gid: uint32(s.uid)}
	}
	return c
}

func (s *stage) succeed(name string, args ...string) error {
	if out, err := s.command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w: %s", name, args, err, out)
	}
	return nil
}

// badMessage returns what is wrong with a command's standard error.
func badMessage(status int, passed bool, out, text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' && r != '\n' || r >= 0x7f && r < 0xa0 }) {
		return "control characters"
	}
	if strings.Contains(text, "goroutine ") || strings.Contains(text, "panic") {
		return "a crash"
	}
	if status != 0 && text == "" && out == "" && !passed { // dist-verify prints corrupt blobs to standard output
		return "no message"
	}
	for line := range strings.Lines(text) {
		word, _, _ := strings.Cut(line, ": ")
		if _, err := os.Stat(filepath.Join(fixture.Bin, word)); err != nil || word == "" {
			return "a line that is no command's"
		}
	}
	return ""
}

// limited keeps the first 64 KiB that are written to it.
type limited struct{ text string }

func (l *limited) Write(p []byte) (int, error) {
	l.text += string(p[:min(len(p), 64<<10-len(l.text))])
	return len(p), nil
}

// fingerprint describes everything below a directory: types, modes, owners, sizes, times and contents.
func fingerprint(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		fmt.Fprintf(&b, "%s %o %d:%d %d %d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Size, st.Ctim.Sec, st.Ctim.Nsec)
		if d.Type().IsRegular() && st.Size < 1<<16 {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			h := fnv.New64a()
			_, _ = h.Write(text)
			fmt.Fprintf(&b, " %x", h.Sum64())
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// reap waits for processes that a command has left behind, which have become children of this one, then ends them, and
// returns their names.
func (s *stage) reap(grace time.Duration) (left []string) {
	end := time.Now().Add(grace)
	for range 1000 {
		alive := 0
		tasks, _ := filepath.Glob("/proc/self/task/*/children")
		for _, f := range tasks {
			list, _ := os.ReadFile(f)
			for _, word := range strings.Fields(string(list)) {
				pid, _ := strconv.Atoi(word)
				if pid == s.canary.Process.Pid {
					continue
				}
				if got, _ := unix.Wait4(pid, nil, unix.WNOHANG, nil); got != 0 {
					continue
				}
				alive++
				if time.Now().After(end) {
					command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
					if text := strings.ReplaceAll(string(command), "\x00", " "); !slices.Contains(left, text) {
						left = append(left, text)
					}
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
		}
		if alive == 0 {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return left
}

// cgroups returns those of the stage's containers, the innermost first.
func (s *stage) cgroups() []string {
	var all []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "distkit-") && strings.Contains(d.Name(), s.id) {
			all = append(all, path)
		}
		return nil // those of others appear and disappear
	})
	slices.Reverse(all)
	return all
}

// thaw resumes paused containers, whose processes could not be killed otherwise.
func thaw(dirs []string) {
	for _, dir := range dirs {
		for name, text := range map[string]string{"cgroup.freeze": "0", "freezer.state": "THAWED"} {
			if f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0); err == nil {
				_, _ = f.WriteString(text)
				f.Close()
			}
		}
	}
}

func removeCgroups(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		if err := os.Remove(dir); !errors.Is(err, fs.ErrNotExist) { // the shim may have removed it
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
