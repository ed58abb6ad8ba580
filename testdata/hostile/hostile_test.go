// Package hostile gives every command stores that strangers have prepared: each file and directory of the layout
// is replaced in turn by what it should not be, as root and as an ordinary user.
//
// A command may fail on such a store, with one line and a status of the table, or succeed. It must not change or
// execute anything outside the store, touch a process that is not its own, leave a process, mount or cgroup behind,
// hang, need much memory, or crash.
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
	other     = 65534 // the ordinary user, and the owner of stores that are another's
)

// long reports whether every command is run on every case that concerns it: HOSTILE=all (make hostile).
func long() bool { return os.Getenv("HOSTILE") == "all" }

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv("HOSTILE_MOUNTS") == "" {
		os.Exit(inOwnMounts())
	}
	// What commands leave running in the background becomes a child of this process, which ends it.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fixture.Main(m)
}

// inOwnMounts runs this program again in a mount namespace of its own, so that mounts are the commands' or nobody's.
func inOwnMounts() int {
	runtime.LockOSThread() // its death is what the child waits for
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

// TestStores runs the cases. Without HOSTILE it runs a sample that is the same each time, in which commands meet cases that
// concern them. HOSTILE=REGEXP runs whatever has such a name, "PATH: CASE: COMMAND".
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
			if u.uid == u.owner { // else what follows might prove nothing
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

// stage is a prepared store and what surrounds it.
type stage struct {
	uid, owner int
	dir        string // holds all of the following
	pristine   string // the store as distkit made it
	work       string // where commands run: the store under test is its .content
	outside    string // what must not change
	private    string // the user's own: HOME, TMPDIR and so on
	env        []string
	id         string   // of the container in the store, which no other on this machine has
	image      []string // the digests of config, manifest and, if there is one, index
	drivers    []string // whose snapshots the store has
	commands   []command
	canary     *exec.Cmd // a process that must not be touched
}

func newStage(t *testing.T, uid, owner int) *stage {
	top := fixture.Dir
	if unix.Access("/dev/shm", unix.W_OK) == nil { // many small files
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

// tryUnchanged runs each command on the store as it is, where all but a few succeed.
func (s *stage) tryUnchanged(t *testing.T) {
	nothing := hostileCase{path: "x", name: "nothing", change: func(*stage, string) error { return nil }}
	for _, cmd := range s.commands {
		status, text := s.try(t, nothing, cmd)
		if !cmd.unsure && (status == 0) == cmd.fails {
			t.Errorf("unchanged: %s: status %d: %s", cmd, status, text)
		}
	}
}

// try runs one command on one changed store, and returns its status and what it said on standard error.
func (s *stage) try(t *testing.T, c hostileCase, cmd command) (status int, text string) {
	name := title(c, cmd)
	if cmd.running && c.name == "link to what was there" && strings.HasPrefix(c.path, "containers") {
		return 0, "" // its monitor has the log open, and rightly goes on writing to it
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

// checkLeft complains about what a command has changed outside of the store or left behind, but for what it said it keeps, and
// takes that away.
func (s *stage) checkLeft(t *testing.T, name string, cmd command, before, said string) {
	var groups []string
	if cmd.runs {
		groups = s.cgroups()
		thaw(groups)
	}
	grace := 2 * time.Second // for those who only have to notice
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
		// What is shown there: the root within the file system, and an overlay's layers.
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

// fresh makes the store under test: a copy of the prepared one, changed. What an earlier one had outside goes.
func (s *stage) fresh(c hostileCase, cmd command) error {
	if err := s.clear(); err != nil {
		return err
	}
	if out, err := exec.Command("cp", "-a", "--", s.pristine, s.work).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	// Executables that a hostile store would name by a path in the working directory.
	if err := os.WriteFile(filepath.Join(s.work, "build.sh"), []byte("#!/bin/sh\ntouch "+s.outside+"/executed\n"), 0o755); err != nil {
		return err
	}
	// A container of a store from elsewhere is not started. This one is the user's own, but then other things in the store
	// are not what they were.
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

// clear takes away what the run before has made.
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

// command is a command in the working directory, as the user.
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

// badMessage says what is wrong with what a command wrote to standard error.
func badMessage(status int, passed bool, out, text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' && r != '\n' || r >= 0x7f && r < 0xa0 }) {
		return "control characters"
	}
	if strings.Contains(text, "goroutine ") || strings.Contains(text, "panic") {
		return "a crash"
	}
	if status != 0 && text == "" && out == "" && !passed { // dist-verify says on standard output what is corrupt
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

// limited keeps the first 64 KiB of what is written.
type limited struct{ text string }

func (l *limited) Write(p []byte) (int, error) {
	l.text += string(p[:min(len(p), 64<<10-len(l.text))])
	return len(p), nil
}

// fingerprint describes all below a directory: types, modes, owners, sizes, times and contents.
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

// reap waits for processes that a command has left behind, which are children of this one by now, and then ends them and
// returns what they were called.
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

// cgroups lists those of the stage's containers, the innermost first.
func (s *stage) cgroups() []string {
	var all []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "distkit-") && strings.Contains(d.Name(), s.id) {
			all = append(all, path)
		}
		return nil // others' come and go meanwhile
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
		if err := os.Remove(dir); !errors.Is(err, fs.ErrNotExist) { // the shim may have been about to
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
