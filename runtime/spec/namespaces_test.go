package spec

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A namespace is new, the host's, given by a path, or another container's. The path of the latter is not known yet.
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

// An ID map that the kernel would refuse, or that lacks a user of the container, is refused with one line.
func TestUserNS(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{
		"x", "0:1", "0:1:2:3", "0:100000:0", "1:100000:5", "0:100000:10,5:200000:10", "0:100000:10,10:100005:10", "0:4294967295:1", "0:1:4294967295",
		"0:-1:1", "0:100000:99999999999", strings.Repeat("0:1:1,", 400) + "0:1:1",
	} {
		if _, err := ParseUserNS(bad); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.60q: %v", bad, err)
		}
	}
	mapped, err := ParseUserNS("0:100000:1000,1000:5000:1")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		o  Options
		ok bool
	}{
		{Options{UserNS: UserNS{Auto: true}}, true},
		{Options{UserNS: mapped, User: "1000:5"}, true},
		{Options{UserNS: mapped, User: "1001:5"}, false},
		{Options{UserNS: mapped, User: "5:5", GroupAdd: []string{"1001"}}, false},
		{Options{UserNS: UserNS{Auto: true}, User: "65536"}, false},
		{Options{UserNS: mapped, Network: "/run/x/netns"}, true},
		{Options{UserNS: mapped, Network: "host"}, false},
		{Options{UserNS: mapped, PID: "container:x"}, false},
		{Options{UserNS: mapped, IPC: "/x/ipc"}, false},
		{Options{UserNS: mapped, Privileged: true}, false},
	} {
		c.o.Args, c.o.Host = []string{"x"}, testHost
		s, err := New(&Image{}, c.o)
		switch {
		case !c.ok && !errdefs.IsInvalidArgument(err):
			t.Errorf("%+v: %v", c.o, err)
		case c.ok && (err != nil || !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })):
			t.Errorf("%+v: %+v, %v", c.o, s, err)
		case c.ok && c.o.Network != "" && len(s.Linux.Sysctl) > 0:
			t.Errorf("%+v: it is to set %v of a network that is not its own", c.o, s.Linux.Sysctl)
		}
	}
}
