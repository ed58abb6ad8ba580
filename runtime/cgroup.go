package runtime

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupMount is a cgroup hierarchy that is mounted below [cgroupRoot].
type cgroupMount struct {
	dir  string
	own  string // this process's cgroup in it, "/" for the root
	kind string // what /proc/PID/cgroup calls it: controllers, name=NAME, or "" for cgroup v2
}

// cgroupMounts lists the hierarchies, and reports whether cgroup v2 is the only one.
func cgroupMounts() (mounts []cgroupMount, unified bool) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, false
	}
	var st unix.Statfs_t
	unified = unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		names := append([]string{parts[1]}, strings.Split(parts[1], ",")...)
		switch {
		case parts[0] == "0" && unified:
			names = []string{""}
		case parts[0] == "0":
			names = []string{"unified"} // runc has a cgroup there too
		case unified:
			continue
		}
		for _, name := range names {
			m := cgroupMount{filepath.Join(cgroupRoot, strings.TrimPrefix(name, "name=")), parts[2], parts[1]}
			if _, err := os.Stat(filepath.Join(m.dir, "cgroup.procs")); err != nil {
				continue
			}
			// Own is outside of a cgroup namespace, or of the part that is mounted here.
			if _, err := os.Stat(filepath.Join(m.dir, m.own)); err != nil || strings.HasPrefix(m.own, "/..") {
				m.own = "/"
			}
			mounts = append(mounts, m)
			break
		}
	}
	return mounts, unified
}

// placement says where the cgroups of one run of a container are: linux.cgroupsPath, and their directories.
// It is empty where this process may not make cgroups.
type placement struct {
	path string
	dirs []string
}

// placeCgroups chooses a container's cgroups. Their name has a random part, so that nothing else has
// it, and what is found in them later is the container's.
func placeCgroups(key, command string) (placement, error) {
	mounts, unified := cgroupMounts()
	for range 100 {
		var random [8]byte
		_, _ = rand.Read(random[:]) // never fails
		name := "distkit-" + key + "-" + hex.EncodeToString(random[:])
		p := placement{path: "/" + name}
		// Runc takes a relative path to be below its own cgroup in each hierarchy of version 1.
		if !unified && filepath.Base(command) == "runc" {
			p.path = name
		}
		for _, m := range mounts {
			parent := m.dir
			if unified || p.path == name {
				parent = filepath.Join(m.dir, m.own)
			}
			if unified {
				p.path = filepath.Join(m.own, name)
			}
			if unix.Access(parent, unix.W_OK) != nil {
				return placement{}, nil
			}
			p.dirs = append(p.dirs, filepath.Join(parent, name))
		}
		if len(existing(p.dirs)) == 0 {
			return p, nil
		}
	}
	return placement{}, failed("cgroups of every name are there already")
}

// existing returns those of the directories that exist.
func existing(dirs []string) []string {
	return slices.DeleteFunc(slices.Clone(dirs), func(d string) bool {
		_, err := os.Lstat(d)
		return err != nil
	})
}

// hierarchy returns the one of the cgroups that has a file.
func hierarchy(cgroups []string, file string) (dir string, ok bool) {
	for _, d := range cgroups {
		if _, err := os.Stat(filepath.Join(d, file)); err == nil {
			return d, true
		}
	}
	return "", false
}

// processes lists what runs in the cgroups and those below them.
func processes(cgroups []string) []int {
	var pids []int
	for _, d := range cgroups {
		_ = filepath.WalkDir(d, func(name string, e fs.DirEntry, err error) error {
			if err != nil || !e.IsDir() {
				return nil //nolint:nilerr // cgroups come and go
			}
			b, _ := os.ReadFile(filepath.Join(name, "cgroup.procs"))
			for _, f := range strings.Fields(string(b)) {
				// 0 is a process of another PID namespace.
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 && !slices.Contains(pids, pid) {
					pids = append(pids, pid)
				}
			}
			return nil
		})
	}
	slices.Sort(pids)
	return pids
}

// frozen tells whether the cgroups are paused.
func frozen(cgroups []string) bool {
	if d, ok := hierarchy(cgroups, "freezer.state"); ok {
		b, _ := os.ReadFile(filepath.Join(d, "freezer.state"))
		return strings.TrimSpace(string(b)) != "THAWED" && len(b) > 0
	}
	if d, ok := hierarchy(cgroups, "cgroup.freeze"); ok {
		b, _ := os.ReadFile(filepath.Join(d, "cgroup.freeze"))
		return strings.TrimSpace(string(b)) == "1"
	}
	return false
}

// thaw lets what is paused go on, so that it can be killed.
func thaw(cgroups []string) {
	if d, ok := hierarchy(cgroups, "freezer.state"); ok {
		_ = os.WriteFile(filepath.Join(d, "freezer.state"), []byte("THAWED"), 0)
	}
	if d, ok := hierarchy(cgroups, "cgroup.freeze"); ok {
		_ = os.WriteFile(filepath.Join(d, "cgroup.freeze"), []byte("0"), 0)
	}
}

// signalAll sends a signal to the processes that list returns. A process may end, and its number become
// another's: so each is opened first, and signalled if it is still listed then.
func signalAll(list func() []int, sig unix.Signal) error {
	fds := map[int]int{}
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	for _, pid := range list() {
		fd, err := unix.PidfdOpen(pid, 0)
		switch {
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL):
		case errors.Is(err, unix.EMFILE) && len(fds) > 0:
			// The caller that kills asks again for the rest.
		case err != nil:
			return fmt.Errorf("open process %d: %w", pid, err)
		default:
			fds[pid] = fd
		}
	}
	if len(fds) == 0 {
		return nil
	}
	for _, pid := range list() {
		if fd, ok := fds[pid]; ok {
			if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("signal process %d: %w", pid, err)
			}
		}
	}
	return nil
}

// killCgroups kills what runs in the cgroups and those below them, and reports whether anything did.
func killCgroups(cgroups []string) (left bool, err error) {
	var byNumber []string
	for _, d := range cgroups {
		f, err := os.OpenFile(filepath.Join(d, "cgroup.kill"), os.O_WRONLY, 0)
		if err != nil { // of version 1, or of a kernel before 5.14
			byNumber = append(byNumber, d)
			continue
		}
		left = left || len(processes([]string{d})) > 0
		_, err = f.WriteString("1")
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return left, fmt.Errorf("kill cgroup %s: %w", d, err)
		}
	}
	list := func() []int { return processes(byNumber) }
	if len(list()) == 0 {
		return left, nil
	}
	thaw(byNumber)
	return true, signalAll(list, unix.SIGKILL)
}

// killAll kills the process of a run, and all that is in its cgroups.
func killAll(ctx context.Context, s *state) error {
	for n := 0; ; n++ {
		left := false
		if s.Boot == bootID() || s.Monitor.Boot == bootID() {
			var err error
			if left, err = killCgroups(s.Cgroups); err != nil {
				return err
			}
		}
		if s.Alive() {
			left = true
			if err := s.signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
		switch {
		case !left:
			return nil
		case n == 1000:
			return failed("its processes can't be killed")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// removeCgroups removes the cgroups, and those below, that nothing runs in.
func removeCgroups(cgroups []string) {
	for _, d := range cgroups {
		var all []string
		_ = filepath.WalkDir(d, func(name string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				all = append(all, name)
			}
			return nil
		})
		for _, name := range slices.Backward(all) {
			_ = unix.Rmdir(name)
		}
	}
}
