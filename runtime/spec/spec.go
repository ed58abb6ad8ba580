// Package spec turns an image's configuration and the caller's flags into an OCI runtime specification, like docker
// does for the same flags. [ReadImage] parses the configuration, the functions Parse... parse flags into [Options], and
// [New] makes the specification. Apart from [ThisHost], [HostDevices] and the look-up of a user's name in the root
// filesystem, it does not look at the host: what depends on the host is passed in as a [Host].
//
// The image is untrusted. It chooses the command, environment, working directory, user and stop signal, and nothing
// else: capabilities, filters, mounts, namespaces and annotations come from the flags. Error classes: InvalidArgument
// for a malformed flag, image or value, NotFound for an unknown user or device, NotImplemented for what the host lacks.
package spec

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// specVersion is the oldest version with everything used here. crun before 1.9 accepts only 1.0.x.
const specVersion = "1.0.2"

// stopSignalAnnotation names the annotation for the signal that stops the container (image-spec conversion.md).
const stopSignalAnnotation = "org.opencontainers.image.stopSignal"

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Options are the caller's choices. The zero value means what docker does with an image: the image's entrypoint,
// command, environment and user, docker's capabilities, seccomp profile, masked paths, sysctls and mounts, and a new
// network namespace with only a loopback device.
type Options struct {
	// Rootfs is the root filesystem. Users' names are looked up there, and it becomes root.path: as "rootfs" if that is
	// its value, meaning the bundle's own, else as an absolute path. If it is "", root.path is "rootfs" and names are
	// not resolved.
	Rootfs string

	Args       []string  // replace the image's Cmd
	Entrypoint *[]string // replaces the image's Entrypoint, and drops its Cmd
	Env        []string  // NAME=VALUE sets a variable, NAME alone removes it
	User       string    // "" means the image's
	Cwd        string
	Hostname   string
	Terminal   bool
	ReadOnly   bool

	Mounts      []specs.Mount // replace default mounts of the same destination; no VolumeType
	Network     string        // a Sharing
	Annotations map[string]string

	// Init is a program on the host, or "". It becomes the container's first process, at [InitPath]; it starts the
	// command and reaps orphans.
	Init string

	PID, IPC, UTS Sharing
	UserNS        UserNS

	Privileged      bool
	CapAdd, CapDrop []string
	NoNewPrivileges bool

	// Seccomp selects the filter of system calls: "default" for docker's profile, "unconfined" for none, anything else
	// is the path of a profile for [ReadSeccomp]. "" means "unconfined" if Privileged is set, else "default".
	Seccomp string
	// AppArmor is the name of a loaded profile. "" and "unconfined" mean none.
	AppArmor string
	// SELinuxLabel is the label of the process, SELinuxMountLabel that of the mounts that the runtime makes.
	SELinuxLabel, SELinuxMountLabel string
	// Sysctls are values for namespaced sysctls, in addition to docker's.
	Sysctls map[string]string

	Rlimits []specs.POSIXRlimit
	Devices []Device
	// CDI names devices of the Container Device Interface. New ignores them: run-cdi adds them to its result.
	CDI []string
	Limits

	GroupAdd    []string // more groups for the process, by name or number
	ShmSize     int64    // bytes of /dev/shm; 0 means docker's 64 MiB
	OOMScoreAdj *int     // nil means the caller's

	// Host describes the host: see [ThisHost].
	Host Host
}

// New returns the runtime specification for a container of the image.
//
// InvalidArgument: there is no command, a value can't be passed to a process, or a mount's destination is relative.
// NotFound: an unknown user.
func New(img *Image, o Options) (*specs.Spec, error) {
	process, err := newProcess(img, o)
	if err != nil {
		return nil, err
	}
	annotations := map[string]string{}
	if s := img.Config.StopSignal; s != "" {
		annotations[stopSignalAnnotation] = string(s)
	}
	maps.Copy(annotations, o.Annotations)
	for name, value := range annotations {
		if err := cmp.Or(CheckText("annotation", name), CheckText("annotation "+name, value)); err != nil {
			return nil, err
		}
	}
	root := specs.Root{Path: "rootfs", Readonly: o.ReadOnly}
	if o.Rootfs != "" && filepath.Clean(o.Rootfs) != "rootfs" {
		// runc requires a path without symbolic links.
		if root.Path, err = filepath.EvalSymlinks(o.Rootfs); err == nil {
			root.Path, err = filepath.Abs(root.Path)
		}
		if err != nil {
			return nil, fmt.Errorf("rootfs: %w", err)
		}
	}
	for what, s := range map[string]string{
		"hostname": o.Hostname, "rootfs": root.Path, "network": o.Network,
		"PID namespace": string(o.PID), "IPC namespace": string(o.IPC), "UTS namespace": string(o.UTS),
	} {
		if err := CheckText(what, s); err != nil {
			return nil, err
		}
	}
	s := &specs.Spec{
		Version:     specVersion,
		Process:     process,
		Root:        &root,
		Hostname:    o.Hostname,
		Annotations: annotations,
		Linux: &specs.Linux{
			MaskedPaths:   slices.Concat(maskedPaths, o.Host.MaskedPaths),
			ReadonlyPaths: slices.Clone(readonlyPaths),
		},
	}
	if s.Linux.Resources, err = o.resources(); err != nil {
		return nil, err
	}
	if s.Linux.Namespaces, err = o.namespaces(); err != nil {
		return nil, err
	}
	if err := o.separate(s); err != nil {
		return nil, err
	}
	if s.Mounts, err = o.mounts(); err != nil {
		return nil, err
	}
	for _, d := range o.Devices {
		if err := CheckText("device", d.Path); err != nil {
			return nil, err
		}
		s.Linux.Devices = append(s.Linux.Devices, d.LinuxDevice)
	}
	if o.Privileged {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	}
	if s.Linux.Sysctl, err = o.sysctls(); err != nil {
		return nil, err
	}
	if s.Linux.Seccomp, err = o.seccomp(process.Capabilities.Bounding); err != nil {
		return nil, err
	}
	if err := o.labelSecurity(s); err != nil {
		return nil, err
	}
	return s, nil
}

func newProcess(img *Image, o Options) (*specs.Process, error) {
	args, cmd := img.Config.Entrypoint.strings(), img.Config.Cmd.strings()
	if len(args) == 1 && args[0] == "" {
		args = nil // docker's way to drop an inherited entrypoint
	}
	if o.Entrypoint != nil {
		args, cmd = append([]string(nil), *o.Entrypoint...), nil
	}
	if len(o.Args) > 0 {
		cmd = o.Args
	}
	args = append(args, cmd...)
	if len(args) == 0 || args[0] == "" {
		return nil, invalid("no command: the image has no entrypoint or command of its own, give one")
	}
	if o.Init != "" {
		args = append([]string{InitPath}, args...)
	}
	for _, a := range args {
		if err := CheckText("argument", a); err != nil {
			return nil, err
		}
	}

	who := o.User
	if who == "" {
		who = string(img.Config.User)
	}
	user, home, err := User(o.Rootfs, who)
	if err != nil {
		return nil, err
	}
	if user.AdditionalGids, err = addGroups(o.Rootfs, user.AdditionalGids, o.GroupAdd); err != nil {
		return nil, err
	}
	if a := o.OOMScoreAdj; a != nil && (*a < -1000 || *a > 1000) {
		return nil, invalid("an OOM score adjustment of %d is not between -1000 and 1000", *a)
	}
	env, err := environment(img, o, home)
	if err != nil {
		return nil, err
	}

	cwd := string(img.Config.WorkingDir)
	if o.Cwd != "" {
		cwd = o.Cwd
	}
	if err := CheckText("working directory", cwd); err != nil {
		return nil, err
	}
	umask := uint32(0o022) // otherwise the runtime passes on its caller's
	user.Umask = &umask
	base := defaultCapabilities
	if o.Privileged {
		base = o.Host.Capabilities
	}
	caps, err := capabilitySet(base, o.CapAdd, o.CapDrop, o.Host.Capabilities)
	if err != nil {
		return nil, err
	}
	return &specs.Process{
		Terminal: o.Terminal,
		User:     user,
		Args:     args,
		Env:      env,
		Cwd:      path.Join("/", cwd),
		// Neither inheritable (CVE-2022-24769) nor ambient: a user other than root has none.
		Capabilities:    &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		Rlimits:         o.Rlimits,
		NoNewPrivileges: o.NoNewPrivileges,
		OOMScoreAdj:     o.OOMScoreAdj,
	}, nil
}

// environment returns PATH, HOSTNAME, TERM and HOME, overridden by the image's variables, and these by the caller's.
// Like docker, it skips entries of the image without a name or without "=": the user can't fix the image.
func environment(img *Image, o Options, home string) ([]string, error) {
	env := []string{"PATH=" + defaultPath}
	if o.Hostname != "" {
		env = append(env, "HOSTNAME="+o.Hostname)
	}
	if o.Terminal {
		env = append(env, "TERM=xterm")
	}
	if home != "" {
		env = append(env, "HOME="+home)
	}
	index := make(map[string]int, len(env)+len(img.Config.Env)+len(o.Env))
	for i, v := range env {
		name, _, _ := strings.Cut(v, "=")
		index[name] = i
	}
	set := func(v string) error {
		if err := CheckText("variable", v); err != nil {
			return err
		}
		name, _, ok := strings.Cut(v, "=")
		if name == "" {
			return invalid("variable %.60q is not NAME=VALUE", v)
		}
		i, have := index[name]
		switch {
		case !ok && have:
			env[i] = ""
			delete(index, name)
		case !ok:
		case have:
			env[i] = v
		default:
			index[name] = len(env)
			env = append(env, v)
		}
		return nil
	}
	for _, v := range img.Config.Env {
		if strings.Index(string(v), "=") < 1 {
			continue
		}
		if err := set(string(v)); err != nil {
			return nil, err
		}
	}
	for _, v := range o.Env {
		if err := set(v); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(env, func(v string) bool { return v == "" }), nil
}

// InitPath is the path of the init program in a container. No image has files in that directory.
const InitPath = "/dev/init"

// IsInit reports whether a mount is that of the init program.
func IsInit(m specs.Mount) bool { return m.Destination == InitPath && m.Type == "bind" }

// mounts returns the default mounts, each replaced by the caller's of the same destination if there is one, then the
// caller's other mounts, outer ones first.
func (o *Options) mounts() ([]specs.Mount, error) {
	all := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
	}
	switch {
	case o.ShmSize < 0:
		return nil, invalid("/dev/shm of %d bytes", o.ShmSize)
	case o.ShmSize > 0:
		shm := &all[len(all)-1]
		shm.Options[len(shm.Options)-1] = fmt.Sprintf("size=%d", o.ShmSize)
	}
	if o.Privileged {
		for i := range all {
			if strings.HasPrefix(all[i].Destination, "/sys") {
				all[i].Options = slices.DeleteFunc(all[i].Options, func(s string) bool { return s == "ro" })
			}
		}
	}
	if !o.UserNS.has(5) { // the group tty is not mapped
		pts := &all[2]
		pts.Options = slices.DeleteFunc(pts.Options, func(s string) bool { return s == "gid=5" })
	}
	if (o.Host.UserNamespace || o.UserNS.Own()) && !Sharing(o.Network).own() {
		// A new sysfs shows a network, and only the owner of that network's user namespace may mount it.
		all = slices.DeleteFunc(all, func(m specs.Mount) bool { return m.Destination == "/sys/fs/cgroup" })
		i := slices.IndexFunc(all, func(m specs.Mount) bool { return m.Destination == "/sys" })
		all[i] = specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", "ro"}}
	}
	if o.IPC == hostNamespace {
		// As in docker, POSIX shared memory and message queues are shared by their directories.
		for _, name := range []string{"/dev/shm", "/dev/mqueue"} {
			i := slices.IndexFunc(all, func(m specs.Mount) bool { return m.Destination == name })
			if slices.Contains(o.Host.Missing, name) {
				all = slices.Delete(all, i, i+1)
				continue
			}
			all[i] = specs.Mount{Destination: name, Type: "bind", Source: name, Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev"}}
		}
	}
	if o.Network == "host" {
		// The host's network needs the host's files for names.
		for _, f := range o.Host.NameFiles {
			all = append(all, specs.Mount{Destination: f, Type: "bind", Source: f, Options: []string{"rbind", "rprivate", "ro"}})
		}
	}
	if o.Init != "" {
		all = append(all, specs.Mount{Destination: InitPath, Type: "bind", Source: o.Init, Options: []string{"bind", "rprivate", "ro", "nosuid", "nodev"}})
	}
	return override(all, o.Mounts)
}

// override checks the caller's mounts. It replaces the default mounts of the same destinations, and appends the others,
// outer ones first.
func override(all, mounts []specs.Mount) ([]specs.Mount, error) {
	var extra []specs.Mount
	for _, m := range mounts {
		if err := CheckText("mount", m.Destination+m.Source+strings.Join(m.Options, ",")); err != nil {
			return nil, err
		}
		if m.Type == VolumeType {
			return nil, invalid("volume %s: volumes by name are for task create and dist-run; the source here is a path: ./%s", m.Source, m.Source)
		}
		if !path.IsAbs(m.Destination) {
			return nil, invalid("mount destination %q is not absolute", m.Destination)
		}
		m.Destination = path.Clean(m.Destination)
		if m.Destination == "/" {
			return nil, invalid("mount destination can't be the root")
		}
		if i := slices.IndexFunc(all, func(d specs.Mount) bool { return d.Destination == m.Destination }); i >= 0 {
			all[i] = m
			continue
		}
		if i := slices.IndexFunc(extra, func(d specs.Mount) bool { return d.Destination == m.Destination }); i >= 0 {
			extra[i] = m // of several for one destination, the last counts
			continue
		}
		extra = append(extra, m)
	}
	slices.SortStableFunc(extra, func(a, b specs.Mount) int {
		return strings.Count(a.Destination, "/") - strings.Count(b.Destination, "/")
	})
	return append(all, extra...), nil
}

func (o *Options) resources() (*specs.LinuxResources, error) {
	r, err := o.Limits.Resources(o.Host)
	if err == nil && o.MemorySwap > 0 && o.Memory == 0 {
		err = invalid("a limit of memory and swap needs one of memory, too")
	}
	if err != nil {
		return nil, err
	}
	allow := func(kind string, major, minor int64) {
		r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: "rwm"})
	}
	if o.Privileged {
		r.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	} else {
		r.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
		// zero, null, urandom, random, tty, console
		for _, d := range [][2]int64{{1, 5}, {1, 3}, {1, 9}, {1, 8}, {5, 0}, {5, 1}} {
			allow("c", d[0], d[1])
		}
		for _, d := range o.Devices {
			r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: d.Access})
		}
	}
	return r, nil
}

// maskedPaths and readonlyPaths are docker's defaults.
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		"/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)
