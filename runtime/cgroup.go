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

	"distkit/errclass"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupMount is a cgroup hierarchy mounted at or below [cgroupRoot].
type cgroupMount struct {
	dir  string
	own  string // this process's cgroup in it, "/" for the root
	kind string // the hierarchy in /proc/PID/cgroup: controllers, name=NAME, or "" for cgroup v2
}

// cgroupMounts lists the hierarchies. unified is true if cgroup v2 is the only one.
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
			names = []string{"unified"} // runc makes a cgroup there too
		case unified:
			continue
		}
		for _, name := range names {
			m := cgroupMount{filepath.Join(cgroupRoot, strings.TrimPrefix(name, "name=")), parts[2], parts[1]}
			if _, err := os.Stat(filepath.Join(m.dir, "cgroup.procs")); err != nil {
				continue
			}
			// own is not visible here: it is outside of this cgroup namespace, or of what is mounted.
			if _, err := os.Stat(filepath.Join(m.dir, m.own)); err != nil || strings.HasPrefix(m.own, "/..") {
				m.own = "/"
			}
			mounts = append(mounts, m)
			break
		}
	}
	return mounts, unified
}

// placement holds the cgroups for one run of a container: linux.cgroupsPath, and the directories that result. It is
// empty if this process may not make cgroups.
type placement struct {
	path string
	dirs []string
	// monitors is the path of a cgroup that the monitor must enter, or "" if the container is below the caller's
	// cgroup. A container elsewhere must not lose its monitor when the caller's cgroup is killed.
	monitors string
}

// defaultParent is the parent cgroup of containers that outlive their caller.
const defaultParent = "/distkit"

// placeCgroups chooses the cgroups of a container. They are below the runtime's parent cgroup, if that is set.
// Otherwise those of a foreground run are below this process's own, so that both are killed together. All others are
// below [defaultParent]. The name has a random part, so that it is unique, and whatever is found in these cgroups later
// belongs to the container. limits lists the cgroup v2 controllers that the container's limits need.
func placeCgroups(key string, r *Runtime, detached bool, limits []string) (placement, error) {
	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails
	name := "distkit-" + key + "-" + hex.EncodeToString(random[:])
	mounts, unified := cgroupMounts()
	if len(mounts) == 0 {
		return placement{}, nil
	}
	var parents []string // "" stands for this process's own cgroup
	switch {
	case r.cgroupParent != "":
		parents = []string{r.cgroupParent}
	case detached:
		parents = []string{defaultParent, ""}
	default:
		parents = []string{"", defaultParent}
	}
	var last placement
	for _, parent := range parents {
		p, ok := placement{}, true
		if unified {
			p, ok = placeUnified(mounts[0], parent, name, limits)
		} else {
			p = placeEach(mounts, parent, name, filepath.Base(r.command) == "runc")
		}
		if p.path != "" && len(existing(p.dirs)) > 0 {
			return placement{}, failed("cgroup %s is there already", p.path)
		}
		if p.path != "" && ok {
			return p, nil
		}
		if last.path == "" {
			last = p
		}
	}
	if last.path == "" && r.cgroupParent != "" {
		return placement{}, errclass.Errorf(errdefs.ErrPermissionDenied, "no cgroups can be made below %s", r.cgroupParent)
	}
	if len(limits) > 0 {
		if len(last.dirs) > 0 {
			limits = lacking(filepath.Dir(last.dirs[0]), "cgroup.subtree_control", limits)
		}
		return placement{}, errNoLimits(limits, filepath.Dir(last.path))
	}
	return last, nil
}

// errNoLimits says that a container can't have limits. A container without a cgroup has the parent ".".
func errNoLimits(controllers []string, parent string) error {
	why := "the cgroup " + parent + " lacks them, or has processes and is not delegated"
	if parent == "." {
		why = "this user can't make cgroups"
	}
	return errclass.Errorf(errdefs.ErrPermissionDenied, "no limits by the cgroup controllers %s: %s; where systemd runs, systemd-run --user --scope -p Delegate=yes COMMAND has a cgroup with them",
		strings.Join(controllers, ", "), why)
}

// lacking returns the controllers that a file of a cgroup v2 does not list.
func lacking(dir, file string, controllers []string) (all []string) {
	b, _ := os.ReadFile(filepath.Join(dir, file))
	for _, c := range controllers {
		if !slices.Contains(strings.Fields(string(b)), c) {
			all = append(all, c)
		}
	}
	return all
}

// placeEach places cgroups in all hierarchies of version 1. This process's own cgroup may have a different path in
// each. Only runc can place cgroups relative to those paths, if given a relative path; other runtimes resolve it from
// the root.
func placeEach(mounts []cgroupMount, parent, name string, relative bool) (p placement) {
	p.path = filepath.Join("/", parent, name)
	if parent != "" {
		p.monitors = filepath.Join(parent, monitorsName)
	} else if relative {
		p.path = name
	}
	for _, m := range mounts {
		dir := filepath.Join(m.dir, parent)
		if parent == "" && relative {
			dir = filepath.Join(m.dir, m.own)
		}
		if parent == "" && !relative && m.own != "/" || !writable(dir) {
			return placement{}
		}
		p.dirs = append(p.dirs, filepath.Join(dir, name))
	}
	return p
}

// placeUnified places a cgroup of version 2. ok is false if the limits can't be set there.
func placeUnified(m cgroupMount, parent, name string, limits []string) (p placement, ok bool) {
	own := parent == ""
	if own {
		parent = m.own
		// If the caller's processes are in a subgroup made by putAside, containers go beside that.
		if up := filepath.Dir(parent); filepath.Base(parent) == supervisorName && delegated(filepath.Join(m.dir, up)) {
			parent = up
		}
	}
	dir := filepath.Join(m.dir, parent)
	if !writable(dir) || !domain(dir) {
		return p, false
	}
	p = placement{path: filepath.Join("/", parent, name), dirs: []string{filepath.Join(dir, name)}}
	if !own {
		p.monitors = filepath.Join(parent, monitorsName)
		return p, len(lacking(m.dir, "cgroup.controllers", limits)) == 0 // the runtime enables the controllers on the way
	}
	if _, err := os.Stat(filepath.Join(dir, "cgroup.type")); err != nil {
		// The root cgroup may have both processes and controllers for children.
		return p, len(lacking(dir, "cgroup.controllers", limits)) == 0
	}
	return p, handOn(dir, limits)
}

// handOn enables controllers for a cgroup's children, and reports whether it could. A cgroup with processes can't do
// that ("no internal processes", cgroups(7)). If the cgroup is delegated, its processes are moved to a subgroup first,
// as podman's --cgroups=split does.
func handOn(dir string, controllers []string) bool {
	missing := func(file string) []string { return lacking(dir, file, controllers) }
	if len(missing("cgroup.subtree_control")) == 0 {
		return true
	}
	if len(missing("cgroup.controllers")) > 0 {
		return false
	}
	enable := func() error {
		return os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+strings.Join(missing("cgroup.subtree_control"), " +")), 0)
	}
	err := enable()
	for tries := 0; errors.Is(err, unix.EBUSY) && tries < 10 && delegated(dir); tries++ { // processes may start in between
		if putAside(dir) != nil {
			return false
		}
		err = enable()
	}
	return err == nil
}

// supervisorName is the subgroup for the processes of a delegated cgroup. monitorsName is the one for monitors of
// containers elsewhere. Neither has containers.
const (
	supervisorName = "supervisor"
	monitorsName   = "distkit-monitors"
)

// putAside moves a cgroup's own processes to a subgroup.
func putAside(dir string) error {
	aside := filepath.Join(dir, supervisorName)
	if err := os.Mkdir(aside, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for _, pid := range strings.Fields(string(b)) {
		if werr := os.WriteFile(filepath.Join(aside, "cgroup.procs"), []byte(pid), 0); werr != nil && !errors.Is(werr, unix.ESRCH) {
			err = werr
		}
	}
	return err
}

// delegated reports whether systemd has delegated a cgroup. It marks those (systemd.resource-control(5), Delegate=).
func delegated(dir string) bool {
	var b [8]byte
	for _, name := range []string{"user.delegate", "trusted.delegate"} {
		if n, err := unix.Getxattr(dir, name, b[:]); err == nil && string(b[:n]) == "1" {
			return true
		}
	}
	return false
}

// domain reports whether a cgroup can have children with whole processes.
func domain(dir string) bool {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.type"))
	kind := strings.TrimSpace(string(b))
	return err != nil || kind == "domain" || kind == "domain threaded" // the root cgroup has no type
}

// writable reports whether this process may make cgroups in a directory. The directory need not exist yet.
func writable(dir string) bool {
	for {
		err := unix.Access(dir, unix.W_OK)
		if !errors.Is(err, unix.ENOENT) || dir == cgroupRoot {
			return err == nil
		}
		dir = filepath.Dir(dir)
	}
}

// enterMonitors moves this process to a cgroup for monitors, in version 2 and in the hierarchy of version 1 where
// systemd tracks processes. It ignores errors: whoever could place the container is usually allowed to do this too.
func enterMonitors(path string) {
	if path == "" {
		return
	}
	mounts, _ := cgroupMounts()
	for _, m := range mounts {
		if m.kind != "" && m.kind != "name=systemd" {
			continue
		}
		dir := filepath.Join(m.dir, path)
		if os.MkdirAll(dir, 0o755) == nil {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
		}
	}
}

// controllers lists the cgroup v2 controllers that the limits need.
func controllers(l *specs.Linux) (all []string) {
	if l == nil || l.Resources == nil {
		return nil
	}
	r := l.Resources
	need := func(name string, needed bool) {
		if needed {
			all = append(all, name)
		}
	}
	need("memory", r.Memory != nil)
	need("cpu", r.CPU != nil && (r.CPU.Shares != nil || r.CPU.Quota != nil || r.CPU.Period != nil))
	need("cpuset", r.CPU != nil && (r.CPU.Cpus != "" || r.CPU.Mems != ""))
	need("pids", r.Pids != nil)
	need("io", r.BlockIO != nil)
	need("hugetlb", len(r.HugepageLimits) > 0)
	return all
}

// CgroupParent sets the parent of the containers' cgroups: a path from the root of each hierarchy. A path with ".." is
// InvalidArgument.
func (r *Runtime) CgroupParent(path string) error {
	if path == "" {
		return nil
	}
	if slices.Contains(strings.Split(path, "/"), "..") || strings.ContainsAny(path, "\n\x00") {
		return invalid("cgroup parent %q is not a path from the root of the hierarchy", path)
	}
	r.cgroupParent = filepath.Join("/", strings.TrimPrefix(path, cgroupRoot+"/"))
	return nil
}

// existing returns the directories that exist.
func existing(dirs []string) []string {
	return slices.DeleteFunc(slices.Clone(dirs), func(d string) bool {
		_, err := os.Lstat(d)
		return err != nil
	})
}

// hierarchy returns the first of the cgroups that has a file of that name.
func hierarchy(cgroups []string, file string) (dir string, ok bool) {
	for _, d := range cgroups {
		if _, err := os.Stat(filepath.Join(d, file)); err == nil {
			return d, true
		}
	}
	return "", false
}

// processes lists the processes in the cgroups and below.
func processes(cgroups []string) []int {
	var pids []int
	for _, d := range cgroups {
		_ = filepath.WalkDir(d, func(name string, e fs.DirEntry, err error) error {
			if err != nil || !e.IsDir() {
				return nil //nolint:nilerr // cgroups come and go
			}
			b, _ := os.ReadFile(filepath.Join(name, "cgroup.procs"))
			for _, f := range strings.Fields(string(b)) {
				// 0 stands for a process in another PID namespace.
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

// frozen reports whether the cgroups are paused.
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

// thaw resumes paused cgroups, so that their processes can be killed.
func thaw(cgroups []string) {
	if d, ok := hierarchy(cgroups, "freezer.state"); ok {
		_ = os.WriteFile(filepath.Join(d, "freezer.state"), []byte("THAWED"), 0)
	}
	if d, ok := hierarchy(cgroups, "cgroup.freeze"); ok {
		_ = os.WriteFile(filepath.Join(d, "cgroup.freeze"), []byte("0"), 0)
	}
}

// signalAll sends a signal to the processes that list returns. A process may end and its number be reused. So each is
// opened first, and signalled only if it is still listed after that.
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
			// a caller that kills will list the rest again
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

// killCgroups kills the processes in the cgroups and below. left is true if there were any.
func killCgroups(cgroups []string) (left bool, err error) {
	var byNumber []string
	for _, d := range cgroups {
		f, err := os.OpenFile(filepath.Join(d, "cgroup.kill"), os.O_WRONLY, 0)
		if err != nil { // cgroup v1, or a kernel before 5.14
			byNumber = append(byNumber, d)
			continue
		}
		left = left || len(processes([]string{d})) > 0
		_, err = f.WriteString("1")
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) { // another process has removed it
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

// killAll kills the process of a run and everything in its cgroups.
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

// removeCgroups removes those cgroups, and cgroups below them, that have no processes.
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
