package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"distkit/cmd/internal/cli"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// inside is the argument 0 with which this program runs in the new namespaces. There it waits until its IDs are mapped,
// and then executes the command.
const inside = "dist-userns: inside"

// idMaps are the arguments of newuidmap(1) and newgidmap(1) after the process ID.
type idMaps struct{ uid, gid []string }

// mappings returns the user's maps: 0 is the user, and the next IDs are the subordinate ones.
func mappings() (m idMaps, err error) {
	uid, gid := strconv.Itoa(os.Getuid()), strconv.Itoa(os.Getgid())
	name := uid
	if u, err := user.LookupId(uid); err == nil {
		name = u.Username
	}
	for _, p := range []struct {
		to   *[]string
		file string
		own  string
	}{{&m.uid, "/etc/subuid", uid}, {&m.gid, "/etc/subgid", gid}} {
		*p.to = []string{"0", p.own, "1"}
		ranges, err := subordinate(p.file, name, uid)
		if err != nil {
			return m, err
		}
		own, err := strconv.ParseUint(p.own, 10, 32)
		if err != nil {
			return m, err
		}
		next := uint64(1)
		for _, r := range disjoint(idRange{own, 1}, ranges) {
			*p.to = append(*p.to, fmt.Sprint(next), fmt.Sprint(r.start), fmt.Sprint(r.count))
			next += r.count
		}
		if len(ranges) == 0 {
			return m, errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf(
				"user %s has no subordinate IDs in %s; as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", name, p.file, name))
		}
	}
	return m, nil
}

type idRange struct{ start, count uint64 }

// subordinate reads a user's ranges from subuid(5) or subgid(5).
func subordinate(file, name, uid string) (ranges []idRange, err error) {
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		w := strings.Split(strings.TrimSpace(lines.Text()), ":")
		if len(w) != 3 || w[0] != name && w[0] != uid {
			continue
		}
		start, err := strconv.ParseUint(w[1], 10, 32)
		count, cerr := strconv.ParseUint(w[2], 10, 32)
		if err == nil && cerr == nil && count > 0 {
			ranges = append(ranges, idRange{start, count})
		}
	}
	return ranges, lines.Err()
}

// disjoint returns the ranges without own, and without IDs in earlier ranges. The kernel refuses a map with an ID
// twice, and a user may have one line by name and another by number.
func disjoint(own idRange, ranges []idRange) (all []idRange) {
	taken := []idRange{own}
	for len(ranges) > 0 {
		r := ranges[0]
		ranges = ranges[1:]
		i := slices.IndexFunc(taken, func(t idRange) bool { return r.start < t.start+t.count && t.start < r.start+r.count })
		if i < 0 {
			all, taken = append(all, r), append(taken, r)
			continue
		}
		var parts []idRange
		if t := taken[i]; r.start < t.start {
			parts = append(parts, idRange{r.start, t.start - r.start})
		}
		if t := taken[i]; r.start+r.count > t.start+t.count {
			parts = append(parts, idRange{t.start + t.count, r.start + r.count - t.start - t.count})
		}
		ranges = append(parts, ranges...)
	}
	return all
}

// run starts the command in new namespaces, forwards signals to it, and ends like it.
func (m idMaps) run(path string, args []string) error {
	for _, tool := range []string{"newuidmap", "newgidmap"} {
		if _, err := exec.LookPath(tool); err != nil {
			return errdefs.ErrNotImplemented.WithMessage(tool + " is not installed (Debian: uidmap)")
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	// The child inherits the pipe under the same number, since lower ones may be the caller's, such as a hold's lock.
	if _, err := unix.FcntlInt(r.Fd(), unix.F_SETFD, 0); err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	// The kernel kills the command if this process is killed. It watches the thread, which must stay.
	runtime.LockOSThread()
	c := &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{inside, strconv.Itoa(int(r.Fd())), strconv.Itoa(os.Getpid()), path}, args...),
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
			Pdeathsig:  unix.SIGTERM,
			// Until its user ID is mapped, the executed program keeps only these.
			AmbientCaps: capabilities(),
		},
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	defer signal.Stop(signals)
	err = c.Start()
	_ = r.Close()
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS), errors.Is(err, unix.EINVAL):
		return errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf(
			"make a user namespace: %v: see user.max_user_namespaces, kernel.unprivileged_userns_clone and AppArmor's restrictions", errors.Unwrap(err)))
	case err != nil:
		return fmt.Errorf("start: %w", err)
	}
	pid := strconv.Itoa(c.Process.Pid)
	for _, do := range [][]string{append([]string{"newuidmap", pid}, m.uid...), append([]string{"newgidmap", pid}, m.gid...)} {
		if out, err := exec.Command(do[0], do[1:]...).CombinedOutput(); err != nil {
			_ = c.Process.Kill()
			_ = c.Wait()
			return errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf("map IDs: %v: %s", err, bytes.TrimSpace(out)))
		}
	}
	_, err = w.Write([]byte{0})
	_ = w.Close()
	if err != nil {
		return fmt.Errorf("start command: %w", err)
	}
	go func() {
		for s := range signals {
			// The terminal has sent the command this signal already.
			if !(s == unix.SIGINT || s == unix.SIGQUIT) || !foreground() {
				_ = c.Process.Signal(s)
			}
		}
	}()
	_ = c.Wait() // its ProcessState is used instead
	ws := c.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) // a core dump is the command's, not ours
		cli.DieBy(ws.Signal())
	}
	if ws.ExitStatus() == 0 {
		return nil
	}
	return cli.Exit(ws.ExitStatus())
}

func forwarded() []os.Signal {
	all := []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGCONT}
	for s := syscall.Signal(34); s <= 64; s++ { // real-time signals, which inits use
		all = append(all, s)
	}
	var heeded []os.Signal
	for _, s := range all {
		if !signal.Ignored(s) {
			heeded = append(heeded, s)
		}
	}
	return heeded
}

// foreground reports whether this process group is in the foreground of the terminal.
func foreground() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

func capabilities() []uintptr {
	last := 40
	if b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			last = n
		}
	}
	all := make([]uintptr, 0, last+1)
	for c := range last + 1 {
		all = append(all, uintptr(c))
	}
	return all
}

// become waits until the IDs are mapped, and executes the command as root. args are the descriptor to wait on, the ID
// of the process outside, the command's path and its arguments.
func become(args []string) {
	runtime.LockOSThread()
	fd, err := strconv.Atoi(args[0])
	if n, _ := unix.Read(fd, make([]byte, 1)); err != nil || n != 1 {
		os.Exit(125) // the process outside reports why
	}
	_ = unix.Close(fd)
	parent, path, args := args[1], args[2], args[3:]
	fail := func(status int, what string, err error) {
		fmt.Fprintf(os.Stderr, "dist-userns: %s: %v\n", what, err)
		os.Exit(status)
	}
	// Mounts of the host appear here, but mounts made here do not leave.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		fail(125, "make mounts private", err)
	}
	// Executing as root gives all capabilities. None must survive a change of user.
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		fail(125, "clear ambient capabilities", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err = unix.Capget(&header, &data[0])
	if err == nil {
		data[0].Inheritable, data[1].Inheritable = 0, 0
		err = unix.Capset(&header, &data[0])
	}
	if err != nil {
		fail(125, "clear inheritable capabilities", err)
	}
	// With this, the command can tell that the process outside was killed before it caught signals.
	if err := os.Setenv("DIST_PARENT", parent); err != nil {
		fail(125, "set DIST_PARENT", err)
	}
	err = unix.Exec(path, args, os.Environ())
	status := cli.Status(cli.NotStarted(err))
	if status < 125 {
		status = 125
	}
	fail(status, path, err)
}
