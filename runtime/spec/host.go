package spec

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"distkit/disk/sys"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Host is what a specification depends on of the host it is for.
type Host struct {
	CgroupV2      bool     // cgroup v2 alone: containers get a cgroup namespace, as docker does
	Capabilities  []string // what a container can be given: the bounding set
	NameFiles     []string // the files that a container in the host's network shares
	LimitsSwap    bool     // the kernel can limit swap
	CPUSet        string   // the processors that can be used, as cpuset(7) lists them; "" if that isn't known
	MemSet        string   // the memory nodes, likewise
	UserNamespace bool     // this is not the machine's own: sysfs of its network can't be mounted
	MaskedPaths   []string // the paths of a processor each that docker masks, too
	Sysctls       []string // those of docker's default sysctls that the kernel has
	AppArmor      bool     // the kernel has it, and it is enabled
	Profiles      []string // the AppArmor profiles that are loaded; nil if they can't be listed
	SELinux       bool     // as AppArmor
}

// ThisHost looks at the host this runs on.
func ThisHost() Host {
	h := Host{Capabilities: boundingSet()}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err == nil {
		h.CgroupV2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	h.LimitsSwap = limitsSwap()
	h.CPUSet, h.MemSet = readSet("cpu/online"), readSet("node/has_memory")
	h.UserNamespace = sys.InUserNamespace()
	// A container could learn from them what other programs compute (moby's GHSA-6fw5-f8r9-fgfm).
	h.MaskedPaths, _ = filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	for name := range defaultSysctls {
		if name == pingGroupRange && os.Geteuid() != 0 {
			continue // an ordinary user's containers are in a user namespace
		}
		if _, err := os.Stat(filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))); err == nil {
			h.Sysctls = append(h.Sysctls, name)
		}
	}
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil {
		h.AppArmor = strings.HasPrefix(string(b), "Y")
		if b, err := os.ReadFile("/sys/kernel/security/apparmor/profiles"); err == nil {
			h.Profiles = profileNames(string(b))
		}
	}
	if err := unix.Statfs("/sys/fs/selinux", &st); err == nil {
		h.SELinux = st.Type == unix.SELINUX_MAGIC
	}
	for _, f := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if _, err := os.Stat(f); err == nil {
			h.NameFiles = append(h.NameFiles, f)
		}
	}
	return h
}

// readSet reads a list of what the system has.
func readSet(name string) string {
	b, _ := os.ReadFile(filepath.Join("/sys/devices/system", name))
	return strings.TrimSpace(string(b))
}

// profileNames reads the kernel's list of AppArmor profiles: "NAME (MODE)" a line.
func profileNames(list string) []string {
	names := []string{}
	for line := range strings.Lines(list) {
		if i := strings.LastIndex(line, " ("); i > 0 {
			names = append(names, line[:i])
		}
	}
	return names
}

// limitsSwap reports whether memory cgroups, of version 1 or 2, have a limit of swap. The root of version 2 has no limits.
func limitsSwap() bool {
	for _, pattern := range []string{"memory/memory.memsw.limit_in_bytes", "memory.swap.max", "*/memory.swap.max"} {
		if found, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", pattern)); len(found) > 0 {
			return true
		}
	}
	return false
}

// Device is a device node in the container and what the container may do with it.
type Device struct {
	specs.LinuxDevice
	Access string // of r, w and m
}

// HostDevices returns a device of the host under the path that it shall have in the container, or, if source is a directory,
// all devices below it but those that every container has of its own. The error is NotFound if there is no source, and
// InvalidArgument if it holds no device.
func HostDevices(source, target, access string) (all []Device, err error) {
	if access == "" || strings.Trim(access, "rwm") != "" {
		return nil, invalid("device %s: access %q is not of r, w and m", source, access)
	}
	if !filepath.IsAbs(target) {
		return nil, invalid("device %s: %q is not an absolute path", source, target)
	}
	// A link may lead to either.
	real, err := filepath.EvalSymlinks(source)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("device %s: %v", source, unix.ENOENT)
	} else if err != nil {
		return nil, fmt.Errorf("device %s: %w", source, err)
	}
	err = filepath.WalkDir(real, func(name string, _ fs.DirEntry, err error) error {
		if err != nil && name != real {
			return nil //nolint:nilerr // devices come and go
		}
		if err == nil && name != real {
			switch name {
			case "/dev/pts", "/dev/shm", "/dev/fd", "/dev/mqueue", "/dev/.lxc", "/dev/.lxd-mounts", "/dev/.udev":
				return fs.SkipDir
			case "/dev/console", "/dev/ptmx", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty":
				return nil
			}
		}
		var st unix.Stat_t
		if err == nil && unix.Lstat(name, &st) == nil {
			if d, ok := deviceOf(&st, filepath.Join(target, strings.TrimPrefix(name, real))); ok {
				all = append(all, Device{d, access})
			}
		}
		return err
	})
	if err == nil && len(all) == 0 {
		return nil, invalid("device %s is not a device, nor a directory with one", source)
	}
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", source, err)
	}
	return all, nil
}

func deviceOf(st *unix.Stat_t, target string) (specs.LinuxDevice, bool) {
	kind := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		kind = "c"
	case unix.S_IFBLK:
		kind = "b"
	default:
		return specs.LinuxDevice{}, false
	}
	mode := os.FileMode(st.Mode & 0o777)
	uid, gid := st.Uid, st.Gid
	return specs.LinuxDevice{
		Path: target, Type: kind, FileMode: &mode, UID: &uid, GID: &gid,
		Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
	}, true
}
