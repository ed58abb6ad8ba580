package runtime

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"distkit/disk"
	"distkit/errclass"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A container whose record has Users runs in its own user namespace. Its snapshot is mounted with owners mapped by that
// namespace. On disk, the owners stay the image's. So each run can have different IDs, and no file is copied or
// changed.
//
// The IDs that are in use on the host are recorded in /run/distkit/users, whatever the state directory is. There is a
// file for each run, valid as long as the run's state exists. A lock keeps two runs from taking the same IDs.

// AutoUsers is the value of [Record].Users for IDs chosen at each run, MappedUsers the value for IDs given in
// config.json.
const (
	AutoUsers   = "auto"
	MappedUsers = "mapped"
)

// idRange is a range of IDs on the host, of users and of groups.
type idRange struct {
	First uint32 `json:"first"`
	Size  uint32 `json:"size"`
}

func (r idRange) end() uint64 { return uint64(r.First) + uint64(r.Size) }

func (r idRange) overlaps(o idRange) bool {
	return uint64(r.First) < o.end() && uint64(o.First) < r.end()
}

// defaultPool is the pool if no range is reserved for containers. It avoids the ranges of systemd (uid-gid.systemd.io)
// and stays below 2^31.
var defaultPool = idRange{0x7000_0000, 0x0ffe_0000}

// poolUser is the user whose ranges in /etc/subuid and /etc/subgid are for containers, as in podman.
const poolUser = "containers"

// usersFile records the host's IDs of a run.
type usersFile struct {
	Run    string    `json:"run"` // private directory of the run
	Auto   bool      `json:"auto,omitempty"`
	Ranges []idRange `json:"ranges"`
}

// mapUsers chooses the host's IDs for the container's users. It returns nil for a container without its own user
// namespace.
func (u *execution) mapUsers(ctx context.Context) ([]specs.LinuxIDMapping, error) {
	c := u.c
	if c.Users == "" {
		return nil, nil
	}
	if !rootOfHost() {
		return nil, errclass.Errorf(errdefs.ErrNotImplemented, "an ordinary user's containers are in a user namespace already")
	}
	dir := filepath.Join(DefaultState(), "users")
	if err := PrivateDir(filepath.Dir(dir)); err != nil {
		return nil, err
	}
	if err := PrivateDir(dir); err != nil {
		return nil, err
	}
	lock, err := disk.LockFile(ctx, filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer disk.Release(lock)
	used, err := usedIDs(dir)
	if err != nil {
		return nil, err
	}
	mine := usersFile{Run: u.claim.dir, Auto: c.Users == AutoUsers}
	var maps []specs.LinuxIDMapping
	if mine.Auto {
		pool, err := idPool()
		if err != nil {
			return nil, err
		}
		r, ok := freeRange(pool, used)
		if !ok {
			return nil, errclass.Errorf(errdefs.ErrUnavailable, "all IDs for containers' users are in use: end a container, or give the user %s more in /etc/subuid and /etc/subgid", poolUser)
		}
		mine.Ranges = []idRange{r}
		maps = []specs.LinuxIDMapping{{HostID: r.First, Size: r.Size}}
	} else {
		b, err := c.openConfig()
		if err != nil {
			return nil, err
		}
		if b.spec.Linux != nil {
			maps = b.spec.Linux.UIDMappings
		}
		if err := spec.CheckIDMap(maps); err != nil {
			return nil, err
		}
		for _, m := range maps {
			r := idRange{m.HostID, m.Size}
			for _, o := range used {
				if o.Auto && slices.ContainsFunc(o.Ranges, r.overlaps) {
					return nil, errclass.Errorf(errdefs.ErrUnavailable, "some of the host's IDs from %d to %d are those of another container's users, which were chosen for it alone", r.First, r.end()-1)
				}
			}
			mine.Ranges = append(mine.Ranges, r)
		}
	}
	b, err := json.Marshal(mine)
	if err == nil {
		u.state.Users = filepath.Join(dir, filepath.Base(u.claim.dir)+"-"+NewID())
		err = disk.Replace(u.state.Users, b, 0o600, false)
	}
	return maps, err
}

// freeUsers frees the host's IDs of a run.
func (s *state) freeUsers() {
	if s.Users != "" {
		_ = os.Remove(s.Users)
	}
}

// usedIDs lists the IDs that are in use. It removes the files of runs that have ended.
func usedIDs(dir string) (all []usersFile, err error) {
	names, err := filepath.Glob(filepath.Join(dir, "*-*"))
	for _, name := range names {
		var u usersFile
		b, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its run has just ended
		}
		if err != nil {
			return nil, err
		}
		if json.Unmarshal(b, &u) == nil {
			if s, err := readPrivateState(u.Run); s != nil || err != nil {
				all = append(all, u)
				continue
			}
		}
		_ = os.Remove(name)
	}
	return all, err
}

// freeRange returns the first free range of the pool.
func freeRange(pool []idRange, used []usersFile) (idRange, bool) {
	var taken []idRange
	for _, u := range used {
		taken = append(taken, u.Ranges...)
	}
	slices.SortFunc(taken, func(a, b idRange) int { return cmp.Compare(a.First, b.First) })
	for _, p := range pool {
		for first := uint64(p.First); first+spec.AutoUsers <= p.end(); {
			r := idRange{uint32(first), spec.AutoUsers}
			i := slices.IndexFunc(taken, r.overlaps)
			if i < 0 {
				return r, true
			}
			first = taken[i].end()
		}
	}
	return idRange{}, false
}

// idPool returns the host's IDs for containers: those reserved for both users and groups, or the default pool unless
// others have parts of it.
func idPool() ([]idRange, error) {
	users, foreignUsers, err := subordinate("/etc/subuid")
	if err != nil {
		return nil, err
	}
	groups, foreignGroups, err := subordinate("/etc/subgid")
	if err != nil {
		return nil, err
	}
	var both []idRange
	for _, u := range users {
		for _, g := range groups {
			first, end := max(u.First, g.First), min(u.end(), g.end())
			if uint64(first) < end {
				both = append(both, idRange{first, uint32(end - uint64(first))})
			}
		}
	}
	switch {
	case len(both) > 0:
		return both, nil
	case slices.ContainsFunc(slices.Concat(foreignUsers, foreignGroups, users, groups), defaultPool.overlaps):
		return nil, failed("no IDs are set aside for containers: give the user %s a range in /etc/subuid and in /etc/subgid", poolUser)
	}
	return []idRange{defaultPool}, nil
}

// subordinate reads a file of subordinate IDs (subuid(5)). It returns the ranges for containers and those of other
// users.
func subordinate(name string) (own, foreign []idRange, err error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	return parseSubordinate(f)
}

func parseSubordinate(r io.Reader) (own, foreign []idRange, err error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Split(strings.TrimSpace(lines.Text()), ":")
		if len(f) != 3 {
			continue
		}
		first, ferr := strconv.ParseUint(f[1], 10, 32)
		size, serr := strconv.ParseUint(f[2], 10, 32)
		if ferr != nil || serr != nil || first == 0 || size == 0 {
			continue
		}
		size = min(size, 1<<32-1-first) // the largest number is not a valid ID
		one := idRange{uint32(first), uint32(size)}
		if f[0] == poolUser {
			own = append(own, one)
		} else {
			foreign = append(foreign, one)
		}
	}
	return own, foreign, lines.Err()
}

// checkSearch returns an error that names the directory if root of a user namespace can't reach it. The runtime's own
// message would say only that permission was denied.
func checkSearch(maps []specs.LinuxIDMapping, dir string) error {
	i := slices.IndexFunc(maps, func(m specs.LinuxIDMapping) bool { return m.ContainerID == 0 })
	if i < 0 {
		return nil
	}
	id := int(maps[i].HostID)
	denied := make(chan string)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread ends with the goroutine
		_, gerr := unix.SetfsgidRetGid(id)
		_, uerr := unix.SetfsuidRetUid(id) // this clears the capability to search any directory
		for at := dir; gerr == nil && uerr == nil; at = filepath.Dir(at) {
			fd, err := unix.Open(at, unix.O_PATH|unix.O_CLOEXEC, 0)
			if err == nil {
				_ = unix.Close(fd)
			}
			if !errors.Is(err, unix.EACCES) {
				if at != dir {
					denied <- at
					return
				}
				break
			}
		}
		denied <- ""
	}()
	if at := <-denied; at != "" {
		return failed("root of the container's user namespace, the host's user %d, can't search %s: chmod o+x it", id, at)
	}
	return nil
}

// userNamespace makes a user namespace with these maps and without processes.
func userNamespace(maps []specs.LinuxIDMapping) (*os.File, error) {
	var ids []syscall.SysProcIDMap
	for _, m := range maps {
		ids = append(ids, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	// A traced process stops before the first instruction of its program. Only the tracing thread may wait for it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := exec.Command("/proc/self/exe")
	c.Env = []string{}
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Ptrace: true, Pdeathsig: unix.SIGKILL,
	}
	if err := c.Start(); err != nil {
		return nil, fmt.Errorf("make a user namespace: %w", err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", c.Process.Pid))
	_ = c.Process.Kill()
	_ = c.Wait()
	return f, err
}
