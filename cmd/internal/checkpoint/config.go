package checkpoint

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"distkit/errclass"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// specification returns the specification of a container that continues a stored one. A checkpoint is data. It decides
// the process, its limits, and whatever any container may have. Anything beyond is restored only if grants has it too.
// Otherwise the error is FailedPrecondition, and names the flags of run-spec that grant it. Hooks, annotations and
// security profiles are never taken from the checkpoint.
func specification(stored []byte, grants spec.Options) (*specs.Spec, error) {
	var old specs.Spec
	if err := json.Unmarshal(stored, &old); err != nil {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "its configuration: %w", err)
	}
	if old.Process == nil || len(old.Process.Args) == 0 || old.Root == nil {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "its configuration has no process or no root filesystem")
	}
	if old.Linux == nil {
		old.Linux = &specs.Linux{}
	}
	o := grants
	o.Args, o.Hostname, o.Terminal, o.ReadOnly = old.Process.Args, old.Hostname, old.Process.Terminal, old.Root.Readonly
	s, err := spec.New(&spec.Image{}, o)
	if err != nil {
		return nil, err
	}
	w := &wants{granted: s}
	w.process(old.Process)
	w.root(old.Root, o.Rootfs)
	w.mounts(old.Mounts, o.Host.NameFiles)
	w.namespaces(old.Linux.Namespaces, grants.Network)
	w.devices(old.Linux.Devices)
	for _, name := range slices.Sorted(maps.Keys(old.Linux.Sysctl)) {
		// The host's network keeps its own values.
		if v := old.Linux.Sysctl[name]; s.Linux.Sysctl[name] != v && (o.Network != "host" || !strings.HasPrefix(name, "net.")) {
			w.add("--sysctl", name+"="+v)
		}
	}
	limits(s.Linux.Resources, old.Linux.Resources)
	if len(w.flags) > 0 {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "it asks for more than any container has; what you grant, repeat: %s", strings.Join(w.flags, " "))
	}
	if len(w.never) > 0 {
		return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "it asks for what no flag grants: %s", strings.Join(w.never, ", "))
	}
	return s, nil
}

// wants collects what a stored configuration has beyond the granted one.
type wants struct {
	granted *specs.Spec
	flags   []string // flags that would grant it
	never   []string
}

func (w *wants) add(flag, value string) {
	if strings.ContainsFunc(value, func(r rune) bool {
		return r <= ' ' || r == '\'' || r == '"' || r == '\\' || r == '$' || r == '`' || !strconv.IsPrint(r)
	}) {
		value = strconv.Quote(value)
	}
	flag += " " + value
	if len(value) > 300 {
		flag = flag[:300] + "…"
	}
	if !slices.Contains(w.flags, flag) {
		w.flags = append(w.flags, flag)
	}
}

// process copies the settings that a process may choose itself.
func (w *wants) process(old *specs.Process) {
	p := w.granted.Process
	p.User = specs.User{UID: old.User.UID, GID: old.User.GID, AdditionalGids: old.User.AdditionalGids, Umask: old.User.Umask}
	p.Env, p.Cwd, p.Rlimits = old.Env, old.Cwd, old.Rlimits
	p.NoNewPrivileges = p.NoNewPrivileges || old.NoNewPrivileges
	if n := old.OOMScoreAdj; n != nil && *n >= 0 {
		p.OOMScoreAdj = n
	}
	if old.Capabilities == nil {
		return
	}
	c, bounding := *old.Capabilities, p.Capabilities.Bounding
	for _, set := range [][]string{c.Bounding, c.Effective, c.Permitted, c.Inheritable, c.Ambient} {
		for _, name := range set {
			if !slices.Contains(bounding, name) {
				w.add("--cap-add", strings.TrimPrefix(name, "CAP_"))
			}
		}
	}
	p.Capabilities = &c
}

func (w *wants) root(old *specs.Root, given string) {
	if old.Path != "rootfs" && given == "" {
		w.add("--rootfs", old.Path)
	}
}

// mounts keeps those granted mounts that the stored container had.
func (w *wants) mounts(old []specs.Mount, names []string) {
	var kept []specs.Mount
	for _, m := range old {
		i := slices.IndexFunc(w.granted.Mounts, func(g specs.Mount) bool {
			return g.Destination == m.Destination && g.Type == m.Type && (m.Type != "bind" || g.Source == m.Source)
		})
		switch {
		case i >= 0:
			kept = append(kept, w.granted.Mounts[i])
		case m.Type == "bind" && isNameFile(m) && w.mounted(m.Destination) != nil:
			kept = append(kept, *w.mounted(m.Destination))
		case m.Type == "bind" && isNameFile(m) && slices.Contains(names, m.Destination):
			// The host's file, which every container in the host's network gets.
			kept = append(kept, specs.Mount{Destination: m.Destination, Source: m.Destination, Type: "bind", Options: []string{"bind", "ro"}})
		case m.Type == "tmpfs":
			options := []string{"nosuid", "nodev"}
			for _, o := range m.Options {
				if strings.HasPrefix(o, "size=") || strings.HasPrefix(o, "mode=") || o == "noexec" || o == "ro" {
					options = append(options, o)
				}
			}
			kept = append(kept, specs.Mount{Destination: m.Destination, Source: "tmpfs", Type: "tmpfs", Options: options})
		default:
			value := fmt.Sprintf("type=%s,src=%s,dst=%s", m.Type, m.Source, m.Destination)
			if slices.Contains(m.Options, "ro") {
				value += ",ro"
			}
			w.add("--mount", value)
		}
	}
	w.granted.Mounts = kept
}

// isNameFile reports whether a mount is one of the files that resolve names, which each container has of its own.
func isNameFile(m specs.Mount) bool {
	return slices.Contains(spec.NameFiles, m.Destination) && path.Base(m.Source) == path.Base(m.Destination)
}

// mounted returns the granted mount on a path, or nil.
func (w *wants) mounted(destination string) *specs.Mount {
	i := slices.IndexFunc(w.granted.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
	if i < 0 {
		return nil
	}
	return &w.granted.Mounts[i]
}

// namespaces requires that the stored container had each of the granted namespaces for itself.
func (w *wants) namespaces(old []specs.LinuxNamespace, network string) {
	i := slices.IndexFunc(old, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
	switch {
	case network != "": // chosen by the caller
	case i < 0:
		w.add("--net", "host")
	case old[i].Path != "":
		w.add("--net", old[i].Path)
	}
	w.never = append(w.never, spec.NeverRestored(old)...)
}

func (w *wants) devices(old []specs.LinuxDevice) {
	var kept []specs.LinuxDevice
	for _, d := range old {
		i := slices.IndexFunc(w.granted.Linux.Devices, func(g specs.LinuxDevice) bool {
			return g.Path == d.Path && g.Type == d.Type && g.Major == d.Major && g.Minor == d.Minor
		})
		if i < 0 {
			w.add("--device", d.Path)
			continue
		}
		kept = append(kept, w.granted.Linux.Devices[i])
	}
	w.granted.Linux.Devices = kept
}

// limits copies limits. They give a container no rights.
func limits(to, from *specs.LinuxResources) {
	if from == nil || to == nil {
		return
	}
	if m := from.Memory; m != nil && to.Memory == nil {
		to.Memory = &specs.LinuxMemory{Limit: m.Limit, Reservation: m.Reservation, Swap: m.Swap}
	}
	if c := from.CPU; c != nil && to.CPU == nil {
		to.CPU = &specs.LinuxCPU{Shares: c.Shares, Quota: c.Quota, Period: c.Period, Cpus: c.Cpus, Mems: c.Mems}
	}
	if p := from.Pids; p != nil && to.Pids == nil {
		to.Pids = &specs.LinuxPids{Limit: p.Limit}
	}
}
