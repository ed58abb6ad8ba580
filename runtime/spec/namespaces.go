package spec

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Sharing says which namespace of a kind a container uses: "" for a new one, "host" for the host's, "container:ID" for
// another container's, or the path of a namespace. For the network, "none" means the same as "".
//
// The processes of another container are known only when this one is started. So [New] leaves the path of
// "container:ID" empty, and whoever runs the container fills it in.
type Sharing string

const (
	hostNamespace   = "host"
	containerPrefix = "container:"
)

// Container returns the ID of the container that the namespace belongs to, or "".
func (s Sharing) Container() string {
	id, ok := strings.CutPrefix(string(s), containerPrefix)
	if !ok {
		return ""
	}
	return id
}

// own reports whether the container gets a new namespace.
func (s Sharing) own() bool { return s == "" || s == "none" }

// namespace returns the namespace for a runtime, or an empty list for the host's.
func (s Sharing) namespace(kind specs.LinuxNamespaceType) ([]specs.LinuxNamespace, error) {
	ns := specs.LinuxNamespace{Type: kind}
	switch {
	case s == "", s == "none" && kind == specs.NetworkNamespace:
	case s == hostNamespace:
		return nil, nil
	case strings.HasPrefix(string(s), containerPrefix):
		if s.Container() == "" {
			return nil, invalid("%s namespace %q: the container's ID is missing", kind, s)
		}
	case strings.Contains(string(s), "/"):
		var err error
		if ns.Path, err = filepath.Abs(string(s)); err != nil {
			return nil, fmt.Errorf("%s namespace %s: %w", kind, s, err)
		}
	case kind == specs.NetworkNamespace:
		return nil, invalid("network %q is not none, host, container:ID or the path of a network namespace", s)
	default:
		return nil, invalid("%s namespace %q is not host, container:ID or the path of a namespace", kind, s)
	}
	return []specs.LinuxNamespace{ns}, nil
}

// isHost reports whether this is the host's namespace, by name or by path. file is the namespace's name in
// /proc/PID/ns.
func (s Sharing) isHost(file string) bool {
	if s == hostNamespace {
		return true
	}
	if !strings.Contains(string(s), "/") {
		return false
	}
	theirs, err := os.Stat(string(s))
	if err != nil {
		return false
	}
	ours, err := os.Stat("/proc/self/ns/" + file)
	return err == nil && os.SameFile(theirs, ours)
}

// Joins returns the IDs of the containers whose namespaces are to be joined, by kind of namespace.
func (o *Options) Joins() map[specs.LinuxNamespaceType]string {
	joins := map[specs.LinuxNamespaceType]string{}
	for kind, s := range map[specs.LinuxNamespaceType]Sharing{
		specs.PIDNamespace: o.PID, specs.IPCNamespace: o.IPC, specs.UTSNamespace: o.UTS, specs.NetworkNamespace: Sharing(o.Network),
	} {
		if id := s.Container(); id != "" {
			joins[kind] = id
		}
	}
	return joins
}

func (o *Options) namespaces() (all []specs.LinuxNamespace, err error) {
	for _, n := range []struct {
		kind specs.LinuxNamespaceType
		of   Sharing
	}{
		{specs.PIDNamespace, o.PID}, {specs.IPCNamespace, o.IPC}, {specs.UTSNamespace, o.UTS}, {specs.MountNamespace, ""},
		{specs.NetworkNamespace, Sharing(o.Network)},
	} {
		ns, err := n.of.namespace(n.kind)
		if err != nil {
			return nil, err
		}
		all = append(all, ns...)
	}
	switch {
	case o.Hostname != "" && !o.UTS.own():
		return nil, invalid("hostname %q: the UTS namespace, which has the host name, is %s", o.Hostname, o.UTS)
	case o.ShmSize != 0 && o.IPC == hostNamespace:
		return nil, invalid("a size of /dev/shm: the IPC namespace is the host's")
	}
	if o.Host.CgroupV2 && !o.Privileged {
		all = append(all, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return all, nil
}

// hostNetwork reports whether the container uses the host's network.
func (o *Options) hostNetwork() bool { return Sharing(o.Network).isHost("net") }

// NeverRestored lists those namespaces, joined or missing, that make it impossible to restore a container's stored
// processes. A restored container has its own PID, IPC, UTS and mount namespaces, and the host's user and time
// namespaces.
func NeverRestored(namespaces []specs.LinuxNamespace) (all []string) {
	for _, t := range []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace} {
		i := slices.IndexFunc(namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
		if i < 0 || namespaces[i].Path != "" {
			all = append(all, "another "+string(t)+" namespace")
		}
	}
	for _, n := range namespaces {
		if n.Type == specs.UserNamespace || n.Type == specs.TimeNamespace {
			all = append(all, "a "+string(n.Type)+" namespace")
		}
	}
	return all
}
