package runtime

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupsOf lists the directories of the cgroups of a process that are not also this
// process's own: those that were made for it.
func cgroupsOf(pid int) []string {
	own := cgroupDirs("self")
	var dirs []string
	for _, d := range cgroupDirs(strconv.Itoa(pid)) {
		if !slices.Contains(own, d) {
			dirs = append(dirs, d)
		}
	}
	return dirs
}

func cgroupDirs(pid string) []string {
	b, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return nil
	}
	var st unix.Statfs_t
	unified := unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
	var dirs []string
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 || parts[2] == "/" || strings.HasPrefix(parts[2], "/..") {
			continue
		}
		hierarchies := append([]string{parts[1]}, strings.Split(parts[1], ",")...)
		switch {
		case parts[0] == "0" && unified:
			hierarchies = []string{""}
		case parts[0] == "0":
			hierarchies = []string{"unified"}
		}
		for _, h := range hierarchies {
			dir := filepath.Join(cgroupRoot, strings.TrimPrefix(h, "name="), parts[2])
			if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
				dirs = append(dirs, dir)
				break
			}
		}
	}
	return dirs
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
