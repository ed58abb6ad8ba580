package checkpoint

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/content"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// storedConfig returns the stored configuration of a container with run-spec's defaults, after a change.
func storedConfig(t *testing.T, change func(*specs.Spec)) []byte {
	t.Helper()
	s, err := spec.New(&spec.Image{}, spec.Options{Args: []string{"sleep", "1"}, Env: []string{"A=b"}, Hostname: "h", Limits: spec.Limits{Memory: 32 << 20}, Host: spec.ThisHost()})
	if err != nil {
		t.Fatal(err)
	}
	change(s)
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A checkpoint gets what any container may have, and anything more only if the caller grants it.
func TestSpecification(t *testing.T) {
	host := spec.ThisHost()
	for name, c := range map[string]struct {
		change func(*specs.Spec)
		wants  string // a part of the error, or "" for none
		grants func(*spec.Options)
	}{
		"what any container has": {change: func(*specs.Spec) {}},
		"a mount of the host": {
			func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/", Destination: "/host", Options: []string{"rbind"}})
			}, "--mount type=bind,src=/,dst=/host",
			func(o *spec.Options) {
				o.Mounts = []specs.Mount{{Type: "bind", Source: "/", Destination: "/host", Options: []string{"rbind"}}}
			},
		},
		"another source below a default destination": {
			func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/etc/shadow", Destination: "/etc/hosts"})
			}, "--mount type=bind,src=/etc/shadow,dst=/etc/hosts", nil,
		},
		"another file system": {
			func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "ext4", Source: "/dev/sda1", Destination: "/d"})
			}, "--mount type=ext4", nil,
		},
		"capabilities": {
			func(s *specs.Spec) {
				s.Process.Capabilities.Effective = append(s.Process.Capabilities.Effective, "CAP_SYS_ADMIN")
			}, "--cap-add SYS_ADMIN",
			func(o *spec.Options) { o.CapAdd = []string{"SYS_ADMIN"} },
		},
		"a device": {
			func(s *specs.Spec) {
				s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda", Type: "b", Major: 8}}
			}, "--device /dev/sda", nil,
		},
		"the host's network": {
			func(s *specs.Spec) {
				s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
			}, "--net host", func(o *spec.Options) { o.Network = "host" },
		},
		"another's network": {
			func(s *specs.Spec) {
				for i, n := range s.Linux.Namespaces {
					if n.Type == specs.NetworkNamespace {
						s.Linux.Namespaces[i].Path = "/proc/1/ns/net"
					}
				}
			}, "--net /proc/1/ns/net", func(o *spec.Options) { o.Network = "none" },
		},
		"the host's processes": {
			func(s *specs.Spec) {
				s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
			}, "another pid namespace", nil,
		},
		"another root": {
			func(s *specs.Spec) { s.Root.Path = "/" }, "--rootfs /", func(o *spec.Options) { o.Rootfs = "/" },
		},
		"a sysctl": {
			func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.core.somaxconn": "9"} }, "--sysctl net.core.somaxconn=9",
			func(o *spec.Options) { o.Sysctls = map[string]string{"net.core.somaxconn": "9"} },
		},
		"escapes": {
			func(s *specs.Spec) { s.Root.Path = "/\x1b[31m;$(reboot)\n" }, `--rootfs "/\x1b[31m;$(reboot)\n"`, nil,
		},
		"no process": {func(s *specs.Spec) { s.Process = nil }, "no process", nil},
	} {
		b := storedConfig(t, c.change)
		_, err := specification(b, spec.Options{Host: host})
		if c.wants == "" && err != nil || c.wants != "" && (!errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), c.wants) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %v", name, err)
		}
		if c.grants == nil {
			continue
		}
		o := spec.Options{Host: host}
		c.grants(&o)
		if _, err := specification(b, o); err != nil {
			t.Errorf("%s, granted: %v", name, err)
		}
	}
}

// Load does not write into a container of another user's store, whose record may name any directory as the bundle.
func TestLoadIntoStrangers(t *testing.T) {
	root, bundle := t.TempDir(), t.TempDir()
	dir := filepath.Join(root, "containers", "default", "x")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "container.json"), []byte(`{"bundle":"`+bundle+`"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := runtime.Open(root, "default", t.TempDir(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := all.Get("x")
	if err != nil {
		t.Fatal(err)
	}
	store, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	err = Load(t.Context(), store, c, digest.FromString("x"), spec.Options{})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "task trust") {
		t.Error(err)
	}
}

// Allowed settings are copied, and settings that weaken the container's isolation are not.
func TestSpecificationKeeps(t *testing.T) {
	n := -1000
	s, err := specification(storedConfig(t, func(s *specs.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh"}}}
		s.Annotations = map[string]string{"run.oci.seccomp_bpf_data": "x", "org.criu.config": "/etc/x"}
		s.Linux.Seccomp, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths, s.Linux.CgroupsPath = nil, nil, nil, "/system.slice"
		s.Linux.RootfsPropagation = "shared"
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		s.Process.ApparmorProfile, s.Process.OOMScoreAdj = "unconfined", &n
		s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/t", Options: []string{"suid", "dev", "size=1m"}})
	}), spec.Options{Host: spec.ThisHost()})
	if err != nil {
		t.Fatal(err)
	}
	if s.Hooks != nil || len(s.Annotations) > 0 || s.Linux.CgroupsPath != "" || s.Linux.RootfsPropagation != "" || s.Process.ApparmorProfile == "unconfined" || s.Process.OOMScoreAdj != nil {
		t.Errorf("it keeps what it must not: %+v %+v", s, s.Process)
	}
	if s.Linux.Seccomp == nil || len(s.Linux.MaskedPaths) == 0 || len(s.Linux.ReadonlyPaths) == 0 {
		t.Error("it has no seccomp profile, or masks nothing")
	}
	for _, d := range s.Linux.Resources.Devices {
		if d.Allow && d.Major == nil && d.Type == "" {
			t.Error("it may use every device")
		}
	}
	if !slices.Equal(s.Process.Args, []string{"sleep", "1"}) || !slices.Contains(s.Process.Env, "A=b") || s.Hostname != "h" || *s.Linux.Resources.Memory.Limit != 32<<20 {
		t.Errorf("it has lost its process or its limits: %+v", s.Process)
	}
	m := s.Mounts[len(s.Mounts)-1]
	if m.Destination != "/t" || !slices.Equal(m.Options, []string{"nosuid", "nodev", "size=1m"}) {
		t.Errorf("tmpfs: %+v", m)
	}
	if _, err := specification([]byte("{"), spec.Options{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("garbage: %v", err)
	}
}
