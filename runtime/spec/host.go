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

// Host holds the properties of the host that a specification depends on.
type Host struct {
	CgroupV2      bool     // only cgroup v2 is mounted: containers get a cgroup namespace, as with docker
	Capabilities  []string // what a container can be given: this process's bounding set
	NameFiles     []string // files that a container in the host's network shares with the host
	LimitsSwap    bool     // the kernel can limit swap
	CPUSet        string   // usable processors as in cpuset(7); "" if unknown
	MemSet        string   // usable memory nodes as in cpuset(7); "" if unknown
	UserNamespace bool     // this process is not in the initial one, so it can't mount a sysfs for the host's network
	Missing       []string // /dev/shm or /dev/mqueue, if the host has none to share
	MaskedPaths   []string // paths of single processors that docker masks too
	Sysctls       []string // docker's default sysctls, as far as the kernel has them
	AppArmor      bool     // AppArmor is enabled
	Profiles      []string // loaded AppArmor profiles; nil if they can't be listed
	SELinux       bool     // SELinux is enabled
}

// ThisHost returns the properties of this host.
func ThisHost() Host {
	h := Host{Capabilities: boundingSet()}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err == nil {
		h.CgroupV2 = st.Type == unix.CGROUP2_SUPER_MAGIC
	}
	h.LimitsSwap = limitsSwap()
	h.CPUSet, h.MemSet = readSet("cpu/online"), readSet("node/has_memory")
	h.UserNamespace = sys.InUserNamespace()
	for _, name := range []string{"/dev/shm", "/dev/mqueue"} {
		if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
			h.Missing = append(h.Missing, name)
		}
	}
	// From these files a container could learn what other programs compute (moby's GHSA-6fw5-f8r9-fgfm).
	h.MaskedPaths, _ = filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	for name := range defaultSysctls {
		if name == pingGroupRange && os.Geteuid() != 0 {
			continue // containers of an ordinary user are in a user namespace
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

// readSet reads a list of processors or memory nodes.
func readSet(name string) string {
	b, _ := os.ReadFile(filepath.Join("/sys/devices/system", name))
	return strings.TrimSpace(string(b))
}

// profileNames parses the kernel's list of AppArmor profiles: "NAME (MODE)" a line.
func profileNames(list string) []string {
	names := []string{}
	for line := range strings.Lines(list) {
		if i := strings.LastIndex(line, " ("); i > 0 {
			names = append(names, line[:i])
		}
	}
	return names
}

// limitsSwap reports whether memory cgroups, of version 1 or 2, can limit swap. The root cgroup of version 2 has no
// files for limits.
func limitsSwap() bool {
	for _, pattern := range []string{"memory/memory.memsw.limit_in_bytes", "memory.swap.max", "*/memory.swap.max"} {
		if found, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", pattern)); len(found) > 0 {
			return true
		}
	}
	return false
}

// Device is a device node in the container, and what the container may do with it.
type Device struct {
	specs.LinuxDevice
	Access string // some of the letters r, w and m
}

// HostDevices returns a device of the host under the path target. If source is a directory, it returns all devices
// below it, except those that every container gets anyway. NotFound: source does not exist. InvalidArgument: it
// contains no device.
func HostDevices(source, target, access string) (all []Device, err error) {
	if access == "" || strings.Trim(access, "rwm") != "" {
		return nil, invalid("device %s: access %q is not of r, w and m", source, access)
	}
	if !filepath.IsAbs(target) {
		return nil, invalid("device %s: %q is not an absolute path", source, target)
	}
	// Source may be a symbolic link to either.
	real, err := filepath.EvalSymlinks(source)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound("device %s: %v", source, unix.ENOENT)
	} else if err != nil {
		return nil, fmt.Errorf("device %s: %w", source, err)
	}
	err = filepath.WalkDir(real, func(name string, entry fs.DirEntry, err error) error {
		if err != nil && name != real {
			return nil //nolint:nilerr // devices come and go
		}
		if err == nil && name != real {
			switch name {
			case "/dev/pts", "/dev/shm", "/dev/fd", "/dev/mqueue", "/dev/.lxc", "/dev/.lxd-mounts", "/dev/.udev":
				if entry.IsDir() { // /dev/fd is a link, and SkipDir would leave out all that comes after it
					return fs.SkipDir
				}
				return nil
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
