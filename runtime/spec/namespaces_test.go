package spec

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A namespace is the container's own, the host's, one with a path, or another container's, whose path is not known yet.
func TestSharing(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		o     Options
		paths map[specs.LinuxNamespaceType]string
		joins map[specs.LinuxNamespaceType]string
	}{
		{Options{}, map[specs.LinuxNamespaceType]string{"pid": "", "ipc": "", "uts": "", "network": ""}, nil},
		{Options{PID: "host", IPC: "host", UTS: "host", Network: "host"}, map[specs.LinuxNamespaceType]string{}, nil},
		{Options{PID: "/x/pid", UTS: "/x/uts", Network: "none"}, map[specs.LinuxNamespaceType]string{"pid": "/x/pid", "ipc": "", "uts": "/x/uts", "network": ""}, nil},
		{
			Options{PID: "container:a", IPC: "container:b", Network: "container:c"},
			map[specs.LinuxNamespaceType]string{"pid": "", "ipc": "", "uts": "", "network": ""},
			map[specs.LinuxNamespaceType]string{"pid": "a", "ipc": "b", "network": "c"},
		},
	} {
		c.o.Args, c.o.Host = []string{"x"}, testHost
		s, err := New(&Image{}, c.o)
		if err != nil {
			t.Errorf("%+v: %v", c.o, err)
			continue
		}
		got := map[specs.LinuxNamespaceType]string{}
		for _, n := range s.Linux.Namespaces {
			if n.Type != specs.MountNamespace && n.Type != specs.CgroupNamespace {
				got[n.Type] = n.Path
			}
		}
		if !maps.Equal(got, c.paths) || !maps.Equal(c.o.Joins(), c.joins) {
			t.Errorf("%+v: %v, joins %v", c.o, got, c.o.Joins())
		}
		if _, ok := s.Linux.Sysctl["net.ipv4.ip_unprivileged_port_start"]; ok != (c.joins["network"] == "" && c.o.Network != "host") {
			t.Errorf("%+v: sysctls %v", c.o, s.Linux.Sysctl)
		}
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev/shm" })
		if host := s.Mounts[i].Type == "bind"; host != (c.o.IPC == "host") {
			t.Errorf("%+v: %+v", c.o, s.Mounts[i])
		}
	}
	for _, o := range []Options{
		{PID: "none"}, {IPC: "private"}, {UTS: "container:"}, {Network: "container:"}, {Network: "bridge"}, {PID: "/x\x00"},
		{UTS: "host", Hostname: "h"}, {UTS: "container:a", Hostname: "h"}, {IPC: "host", ShmSize: 1},
		{Network: "container:a", Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}},
		{IPC: "container:a", Sysctls: map[string]string{"kernel.shmmax": "1"}},
		{IPC: "host", Sysctls: map[string]string{"fs.mqueue.msg_max": "1"}},
		{IPC: "/proc/self/ns/ipc", Sysctls: map[string]string{"kernel.shmmax": "1"}},
	} {
		o.Args, o.Host = []string{"x"}, testHost
		if _, err := New(&Image{}, o); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
