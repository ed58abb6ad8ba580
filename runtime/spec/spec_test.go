package spec

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/runtime/internal/testenv"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files")

var testHost = Host{Capabilities: capabilities, NameFiles: []string{"/etc/hosts"}, Sysctls: slices.Sorted(maps.Keys(defaultSysctls))}

func image(t *testing.T, s string) *Image {
	t.Helper()
	img, err := ReadImage(strings.NewReader(s))
	if err != nil {
		t.Fatal(err)
	}
	return img
}

const redis = `{"architecture":"arm64","variant":"v8","os":"linux","author":"A <a@example.org>","created":"2026-01-02T03:04:05Z",
"config":{"Entrypoint":["docker-entrypoint.sh"],"Cmd":["redis-server"],"Env":["PATH=/usr/bin:/bin","VERSION=7"],
"WorkingDir":"/data","Volumes":{"/data":{}},"ExposedPorts":{"6379/tcp":{},"16379/tcp":{}},"Labels":{"a":"b",
"org.opencontainers.image.author":"label wins"},"StopSignal":"SIGTERM"},"rootfs":{"type":"layers","diff_ids":[]}}`

func profileFile(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "profile.json")
	testenv.Write(t, name, profile)
	return name
}

func TestGolden(t *testing.T) {
	for name, o := range map[string]Options{
		"default":    {},
		"cgroup2":    {Host: Host{CgroupV2: true, Capabilities: capabilities}},
		"userns":     {Host: Host{UserNamespace: true, Capabilities: capabilities, NameFiles: []string{"/etc/hosts"}, Sysctls: testHost.Sysctls}, Network: "host"},
		"privileged": {Privileged: true, Terminal: true, CapDrop: []string{"mknod"}},
		"limits": {
			Limits: Limits{Memory: 512 << 20, CPUs: 1.5, Pids: 100}, ReadOnly: true, Hostname: "h", Network: "host", NoNewPrivileges: true,
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1, Hard: 2}}, Annotations: map[string]string{"a": "c"},
			CapAdd: []string{"SYS_ADMIN"}, CapDrop: []string{"ALL"}, Seccomp: profileFile(t),
			Mounts: []specs.Mount{
				{Destination: "/b/c", Type: "bind", Source: "/x", Options: []string{"rbind"}},
				{Destination: "/b/", Type: "tmpfs", Source: "tmpfs"},
				{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"size=1g"}},
				{Destination: "/b//c/", Type: "bind", Source: "/last", Options: []string{"rbind"}},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if o.Host.Capabilities == nil {
				o.Host = testHost
			}
			s, err := New(image(t, redis), o)
			if err != nil {
				t.Fatal(err)
			}
			if o.Seccomp == "" && !o.Privileged {
				if want, _ := DefaultSeccomp(s.Process.Capabilities.Bounding); !reflect.DeepEqual(s.Linux.Seccomp, want) {
					t.Errorf("seccomp: %+v", s.Linux.Seccomp)
				}
				s.Linux.Seccomp = nil // docker's default is long and depends on the kernel
			} else if s.Linux.Seccomp != nil {
				s.Linux.Seccomp.Architectures = nil // depends on the machine
			}
			got, err := json.MarshalIndent(s, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			file := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s differs; run the test with -update and look at the difference:\n%s", file, got)
			}
		})
	}
}

func TestArguments(t *testing.T) {
	e := func(s ...string) *[]string { return &s }
	for _, c := range []struct {
		image      string
		entrypoint *[]string
		args       []string
		want       string
	}{
		{`{"Entrypoint":["e"],"Cmd":["c"]}`, nil, nil, "e c"},
		{`{"Entrypoint":["e"],"Cmd":["c"]}`, nil, []string{"x", "y"}, "e x y"},
		{`{"Entrypoint":["e"]}`, nil, nil, "e"},
		{`{"Cmd":["c"]}`, nil, nil, "c"},
		{`{"Cmd":["c"]}`, nil, []string{"x"}, "x"},
		{`{"Entrypoint":["e"],"Cmd":["c"]}`, e("f"), nil, "f"},
		{`{"Entrypoint":["e"],"Cmd":["c"]}`, e("f"), []string{"x"}, "f x"},
		{`{"Entrypoint":["e"],"Cmd":["c"]}`, e(), []string{"x"}, "x"},
		{`{"Entrypoint":["e"],"Cmd":["c"]}`, e(), nil, ""},
		{`{}`, nil, nil, ""},
		{`{"Cmd":[""]}`, nil, nil, ""},
		{`{"Entrypoint":[""],"Cmd":["c"]}`, nil, nil, "c"},
		{`{"Entrypoint":"/a b","Cmd":["c"]}`, nil, nil, "/a b c"},
		{`{"Cmd":"/a b"}`, nil, nil, "/a b"},
		{`{"Cmd":["c"],"ExposedPorts":["80/tcp"],"Labels":["a=b"],"Volumes":"/v","Healthcheck":5,"StopSignal":15,"OnBuild":{}}`, nil, nil, "c"},
		{`{"Entrypoint":null,"Cmd":null}`, nil, []string{"x"}, "x"},
	} {
		s, err := New(image(t, `{"config":`+c.image+`}`), Options{Entrypoint: c.entrypoint, Args: c.args, Host: testHost})
		switch {
		case c.want == "" && !errdefs.IsInvalidArgument(err):
			t.Errorf("%+v: %v", c, err)
		case c.want != "" && (err != nil || strings.Join(s.Process.Args, " ") != c.want):
			t.Errorf("%+v: %v %v", c, s, err)
		}
	}
}

func TestEnvironment(t *testing.T) {
	root := t.TempDir()
	testenv.Write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0::/root:\n")
	img := image(t, `{"config":{"Cmd":["x"],"Env":["A=1","TERM=vt100","A=2","B=","NOVALUE","","=x","=",null,"PATH"]}}`)
	for _, c := range []struct {
		o    Options
		want []string
	}{
		{Options{}, []string{"PATH=" + defaultPath, "A=2", "TERM=vt100", "B="}}, // like docker, we skip entries without a name or "="
		{Options{Rootfs: root, Hostname: "h", Terminal: true}, []string{"PATH=" + defaultPath, "HOSTNAME=h", "TERM=vt100", "HOME=/root", "A=2", "B="}},
		{Options{Env: []string{"A=3=4", "PATH", "C=5", "NONE"}}, []string{"A=3=4", "TERM=vt100", "B=", "C=5"}},
		{Options{Env: []string{"A", "A=6"}}, []string{"PATH=" + defaultPath, "TERM=vt100", "B=", "A=6"}},
	} {
		c.o.Host = testHost
		s, err := New(img, c.o)
		if err != nil {
			t.Errorf("%+v: %v", c.o, err)
		} else if !slices.Equal(s.Process.Env, c.want) {
			t.Errorf("%+v: %q, not %q", c.o, s.Process.Env, c.want)
		}
	}
}

func TestHostileImages(t *testing.T) {
	for _, s := range []string{
		"", "  \n", "null", "[]", "{", `"x"`, "<html>", `{}`, `{"config":3}`, `{"config":{"Cmd":5}}`, `{"config":{"User":1}}`,
		"{\"config\":{\"Cmd\":[\"caf\xe9\"]}}", "{\"config\":{\"Cmd\":\"caf\xe9\"}}", "{\"config\":{\"Env\":[\"A=caf\xe9\"]}}", "{\"config\":{\"WorkingDir\":\"caf\xe9\"}}",
		`{"schemaVersion":2,"config":{},"layers":[]}`, `{"schemaVersion":2,"manifests":[]}`,
		strings.Repeat(" ", MaxDocument+1), strings.Repeat("[", 1<<20),
	} {
		if img, err := ReadImage(strings.NewReader(s)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.40q: %+v %v", s, img, err)
		}
	}
	for _, c := range []string{
		`{"Cmd":["a\u0000b"]}`, `{"Cmd":["x"],"Env":["A=\u0000"]}`,
		`{"Cmd":["x"],"User":"0\u0000"}`, `{"Cmd":["x"],"WorkingDir":"/\u0000"}`,
		`{"Cmd":["` + strings.Repeat("x", maxText+1) + `"]}`, `{"Cmd":["x"],"User":"4294967295"}`,
	} {
		if _, err := New(image(t, `{"config":`+c+`}`), Options{Host: testHost}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.60q: %v", c, err)
		}
	}
	s, err := New(image(t, `{"config":{"Cmd":["x"],"WorkingDir":"../../etc","Labels":{"":"x"}}}`), Options{Host: testHost})
	if err != nil || s.Process.Cwd != "/etc" || len(s.Annotations) != 0 {
		t.Errorf("%+v %v", s, err)
	}
}

// A health check is data for others: one that can't be used is none, and keeps no image from running.
func TestHealthcheck(t *testing.T) {
	t.Parallel()
	h := image(t, `{"config":{"Cmd":["x"],"Healthcheck":{"Test":["CMD-SHELL","curl -f localhost"],"Interval":30000000000,"Retries":3}}}`).Config.Healthcheck
	if h == nil || !slices.Equal(h.Test, []string{"CMD-SHELL", "curl -f localhost"}) || h.Interval != 30*time.Second || h.Retries != 3 || h.Timeout != 0 {
		t.Errorf("%+v", h)
	}
	for _, text := range []string{
		`5`, `null`, `[]`, `{}`, `{"Test":null}`, `{"Test":["NONE"]}`, `{"Test":["CMD"]}`, `{"Test":["RUN","x"]}`, `{"Test":"CMD x"}`, `{"Test":["CMD","x"],"Interval":"30s"}`,
		`{"Test":["CMD","` + strings.Repeat("x", maxHealthcheck) + `"]}`, "{\"Test\":[\"CMD\",\"caf\xe9\"]}",
	} {
		if h := image(t, `{"config":{"Cmd":["x"],"Healthcheck":`+text+`}}`).Config.Healthcheck; h != nil {
			t.Errorf("%.60q: %+v", text, h)
		}
	}
}

// Text that JSON would change is refused, wherever it comes from.
func TestSpecRefusesOtherBytes(t *testing.T) {
	const x = "/caf\xe9"
	dir := filepath.Join(t.TempDir(), x)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skip(err)
	}
	for _, o := range []Options{
		{Args: []string{x}}, {Entrypoint: &[]string{x}}, {Env: []string{"A=" + x}}, {User: x}, {Cwd: x}, {Hostname: x}, {Rootfs: dir},
		{Network: x}, {Mounts: []specs.Mount{{Destination: x}}}, {Mounts: []specs.Mount{{Destination: "/a", Source: x}}},
		{Annotations: map[string]string{"a": x}}, {Annotations: map[string]string{x: "a"}}, {Devices: []Device{{LinuxDevice: specs.LinuxDevice{Path: x}}}},
		{Sysctls: map[string]string{"net.a": x}}, {AppArmor: x}, {SELinuxLabel: "a:b:" + x},
	} {
		o.Host = testHost
		o.Host.AppArmor, o.Host.SELinux = true, true
		if _, err := New(image(t, `{"config":{"Cmd":["x"]}}`), o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestRootPath(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	dir, _ = os.Getwd()
	for rootfs, want := range map[string]string{
		"": "rootfs", "rootfs": "rootfs", "./rootfs": "rootfs", "rootfs/": "rootfs",
		"b/rootfs": filepath.Join(dir, "b/rootfs"), "/": "/", "link": filepath.Join(dir, "rootfs"),
	} {
		_ = os.MkdirAll("rootfs", 0o755)
		_ = os.MkdirAll("b/rootfs", 0o755)
		_ = os.Symlink("rootfs", "link")
		s, err := New(image(t, `{"config":{"Cmd":["x"]}}`), Options{Rootfs: rootfs, Host: testHost})
		if err != nil || s.Root.Path != want {
			t.Errorf("%q: %+v %v", rootfs, s, err)
		}
	}
}

func TestCapabilities(t *testing.T) {
	for _, c := range []struct {
		add, drop []string
		want      string
	}{
		{nil, []string{"all"}, ""},
		{[]string{"cap_sys_admin", "NET_ADMIN"}, []string{"ALL"}, "CAP_NET_ADMIN CAP_SYS_ADMIN"},
		{[]string{"ALL"}, []string{"KILL"}, strings.Join(slices.DeleteFunc(slices.Clone(capabilities[:38]), func(c string) bool { return c == "CAP_KILL" }), " ")},
		{nil, strings.Fields("CHOWN DAC_OVERRIDE FOWNER FSETID SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE"), "CAP_KILL CAP_SETFCAP"},
		{[]string{"KILL"}, []string{"KILL", "ALL"}, ""},
	} {
		got, err := capabilitySet(defaultCapabilities, c.add, c.drop, capabilities[:38])
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("add %v, drop %v: %v %v", c.add, c.drop, got, err)
		}
	}
	if _, err := capabilitySet(nil, []string{"FLY"}, nil, capabilities); !errdefs.IsInvalidArgument(err) {
		t.Errorf("FLY: %v", err)
	}
	if len(defaultCapabilities) != 14 || len(capabilities) != 41 {
		t.Errorf("%d and %d capabilities", len(defaultCapabilities), len(capabilities))
	}
}

func TestParse(t *testing.T) {
	wd, _ := os.Getwd()
	mounts := []struct {
		parse func(string) (specs.Mount, error)
		s     string
		want  *specs.Mount
	}{
		{ParseMount, "src=/a,dst=/b", &specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "rprivate"}}},
		{ParseMount, `"src=/a,b",target=/b,readonly`, &specs.Mount{Type: "bind", Source: "/a,b", Destination: "/b", Options: []string{"rbind", "rprivate", "ro"}}},
		{ParseMount, "type=bind,source=x,destination=/b,options=bind:ro:shared", &specs.Mount{Type: "bind", Source: wd + "/x", Destination: "/b", Options: []string{"bind", "ro", "shared"}}},
		{ParseMount, "type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=700", &specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/t", Options: []string{"nosuid", "nodev", "noexec", "size=1048576", "mode=700"}}},
		{ParseMount, "src=/a,dst=/b,ro=false", &specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "rprivate"}}},
		{ParseMount, "src=/a", nil}, {ParseMount, "dst=/a", nil}, {ParseMount, "src=/a,dst=/b,colour=red", nil}, {ParseMount, "", nil},
		{ParseMount, "src=/a,dst=/b,ro=perhaps", nil}, {ParseMount, "src=/a,dst=/b,bind-propagation=x", nil},
		{ParseVolume, "/a:/b", &specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "rprivate"}}},
		{ParseVolume, "./a:/b:ro,rslave", &specs.Mount{Type: "bind", Source: wd + "/a", Destination: "/b", Options: []string{"rbind", "ro", "rslave"}}},
		{ParseVolume, "named:/b:ro", &specs.Mount{Type: "volume", Source: "named", Destination: "/b", Options: []string{"rbind", "ro", "rprivate"}}},
		{ParseMount, "type=volume,src=named,dst=/b", &specs.Mount{Type: "volume", Source: "named", Destination: "/b", Options: []string{"rbind", "rprivate"}}},
		{ParseMount, "type=volume,dst=/b", nil}, {ParseVolume, "/a", nil}, {ParseVolume, "/a:/b:fast", nil}, {ParseVolume, "/a:/b:ro:x", nil},
		{ParseTmpfs, "/t:size=1m,exec", &specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/t", Options: []string{"nosuid", "nodev", "noexec", "size=1m", "exec"}}},
		{ParseTmpfs, "t", nil},
	}
	for _, c := range mounts {
		m, err := c.parse(c.s)
		switch {
		case c.want == nil && !errdefs.IsInvalidArgument(err):
			t.Errorf("%q: %+v %v", c.s, m, err)
		case c.want != nil && (err != nil || !reflect.DeepEqual(m, *c.want)):
			t.Errorf("%q: %+v %v", c.s, m, err)
		}
	}
	for s, want := range map[string]int64{"0": 0, "5": 5, "1k": 1024, "1.5K": 1536, "512m": 512 << 20, "2GiB": 2 << 30, "1tb": 1 << 40} {
		if n, err := ParseSize(s); err != nil || n != want {
			t.Errorf("%s: %d %v", s, n, err)
		}
	}
	for _, s := range []string{"", "m", "-1", "nan", "inf", "1x", "9999999t", "1mm", "much"} {
		if n, err := ParseSize(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %d %v", s, n, err)
		}
	}
	for s, want := range map[string]specs.POSIXRlimit{
		"nofile=5": {Type: "RLIMIT_NOFILE", Soft: 5, Hard: 5}, "RLIMIT_CORE=0:-1": {Type: "RLIMIT_CORE", Hard: 1<<64 - 1},
	} {
		if r, err := ParseRlimit(s); err != nil || r != want {
			t.Errorf("%s: %+v %v", s, r, err)
		}
	}
	for _, s := range []string{"nofile", "x=1", "nofile=2:1", "nofile=", "nofile=a"} {
		if r, err := ParseRlimit(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %+v %v", s, r, err)
		}
	}
	if d, err := ParseDevice("/dev/null:/dev/x:r"); err != nil || len(d) != 1 || d[0].Path != "/dev/x" || d[0].Major != 1 || d[0].Minor != 3 || d[0].Access != "r" {
		t.Errorf("%+v %v", d, err)
	}
	for s, is := range map[string]func(error) bool{
		"/dev/null:q": errdefs.IsInvalidArgument, "/etc/passwd": errdefs.IsInvalidArgument, "/dev/none": errdefs.IsNotFound, "a:b:c:d": errdefs.IsInvalidArgument,
	} {
		if _, err := ParseDevice(s); !is(err) {
			t.Errorf("%s: %v", s, err)
		}
	}
	for s, want := range map[string]int64{"-1": -1, "1k": 1024} {
		if n, err := ParseLimit(s); err != nil || n != want {
			t.Errorf("%s: %d %v", s, n, err)
		}
	}
	t.Setenv("FROM_HERE", "v")
	env, err := ReadEnv(strings.NewReader("# c\n\n  A=1 2 \nFROM_HERE\nNOT_HERE\n"))
	if err != nil || !slices.Equal(env, []string{"A=1 2 ", "FROM_HERE=v", "NOT_HERE"}) {
		t.Errorf("%q %v", env, err)
	}
}

// A directory stands for all devices below it, under the target. Other files are skipped.
func TestDevicesOfADirectory(t *testing.T) {
	dir := t.TempDir()
	nodes := filepath.Join(dir, "nodes")
	if err := os.MkdirAll(filepath.Join(nodes, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	testenv.Write(t, filepath.Join(nodes, "file"), "")
	if _, err := ParseDevice(nodes); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without a device: %v", err)
	}
	testenv.Require(t, "root")
	for i, name := range []string{"one", "below/two"} {
		if err := unix.Mknod(filepath.Join(nodes, name), unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(3+2*i)))); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("nodes", link); err != nil {
		t.Fatal(err)
	}
	for _, source := range []string{nodes, link} {
		all, err := ParseDevice(source + ":/dev/these:r")
		var got []string
		for _, d := range all {
			got = append(got, fmt.Sprintf("%s %s %d:%d %s", d.Path, d.Type, d.Major, d.Minor, d.Access))
		}
		if want := []string{"/dev/these/below/two c 1:5 r", "/dev/these/one c 1:3 r"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q %v", source, got, err)
		}
	}
}

// --privileged gives all devices of the host, whatever links and directories are among them.
func TestDevicesOfTheHost(t *testing.T) {
	t.Parallel()
	all, err := HostDevices("/dev", "/dev", "rwm")
	if err != nil && !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/dev")
	if err != nil {
		t.Fatal(err)
	}
	usual := []string{"console", "ptmx", "null", "zero", "full", "random", "urandom", "tty"}
	for _, e := range entries {
		if e.Type()&fs.ModeDevice == 0 || slices.Contains(usual, e.Name()) {
			continue
		}
		if !slices.ContainsFunc(all, func(d Device) bool { return d.Path == "/dev/"+e.Name() }) {
			t.Errorf("%s is missing", e.Name())
		}
	}
}

const profile = `{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"archMap":[
{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},{"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]}],
"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"},{"name":"write","action":"SCMP_ACT_ALLOW"},
{"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
{"names":["chroot"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_CHROOT"]}},
{"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]}},
{"names":["s390"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["s390"]}}]}`

// Our default profile has fewer rules than docker's, but allows the same.
func TestDefaultSeccompRules(t *testing.T) {
	docker, err := seccomp.GetDefaultProfile(bounded(nil))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := DefaultSeccomp(nil)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(ours.Architectures, specs.ArchX32) || len(ours.Architectures) < 1 {
		t.Errorf("architectures: %q", ours.Architectures)
	}
	// apply returns the actions for a call with this first argument. Rules on other arguments are equal in both.
	apply := func(p *specs.LinuxSeccomp, name string, value uint64) (actions []specs.LinuxSeccompAction) {
		for _, r := range p.Syscalls {
			if !slices.Contains(r.Names, name) {
				continue
			}
			holds := true
			for _, a := range r.Args {
				switch a.Op {
				case specs.OpEqualTo:
					holds = holds && value == a.Value
				case specs.OpMaskedEqual:
					holds = holds && value&a.Value == a.ValueTwo
				case specs.OpLessThan:
					holds = holds && value < a.Value
				default:
					t.Fatalf("%s: no rule of %s is known here", a.Op, name)
				}
			}
			if holds {
				actions = append(actions, r.Action)
			}
		}
		return slices.Compact(actions)
	}
	values := []uint64{1 << 17, 1<<17 | 8, 1<<17 | 9, 1 << 31, 1<<32 - 1, 1<<32 | 8, 1 << 63, ^uint64(0), 0x7e020000, 0x10000000}
	for v := range uint64(300) {
		values = append(values, v, v<<8, v<<32|v)
	}
	for _, name := range []string{"socket", "personality", "clone", "read", "bpf"} {
		for _, v := range values {
			if want, got := apply(docker, name, v), apply(ours, name, v); !slices.Equal(want, got) {
				t.Errorf("%s(%#x): %q, not docker's %q", name, v, got, want)
			}
		}
	}
	if len(ours.Syscalls) > len(docker.Syscalls)-10 {
		t.Errorf("%d rules of docker's %d", len(ours.Syscalls), len(docker.Syscalls))
	}
}

// Docker's profile allows calls that the container's capabilities are for, and refuses the others.
func TestDefaultSeccomp(t *testing.T) {
	for _, c := range []struct {
		caps  []string
		allow []string
		deny  []string
	}{
		{nil, []string{"read", "openat", "execve"}, []string{"mount", "kexec_load", "init_module", "bpf"}},
		{[]string{"SYS_ADMIN"}, []string{"read", "mount", "bpf"}, []string{"kexec_load", "init_module"}},
		{[]string{"ALL"}, []string{"mount", "init_module"}, []string{"kexec_load"}},
	} {
		s, err := New(image(t, redis), Options{CapAdd: c.caps, Host: testHost})
		if err != nil {
			t.Fatal(err)
		}
		p := s.Linux.Seccomp
		if p.DefaultAction != specs.ActErrno || len(p.Architectures) == 0 {
			t.Errorf("%v: %v, %v", c.caps, p.DefaultAction, p.Architectures)
		}
		allowed := func(name string) bool {
			return slices.ContainsFunc(p.Syscalls, func(r specs.LinuxSyscall) bool {
				return r.Action == specs.ActAllow && slices.Contains(r.Names, name)
			})
		}
		for _, name := range c.allow {
			if !allowed(name) {
				t.Errorf("%v: %s is refused", c.caps, name)
			}
		}
		for _, name := range c.deny {
			if allowed(name) {
				t.Errorf("%v: %s is let through", c.caps, name)
			}
		}
	}
}

// A container is filtered by default. --privileged removes the filter, unless one is named.
func TestSeccompMode(t *testing.T) {
	file := profileFile(t)
	for _, c := range []struct {
		mode       string
		privileged bool
		want       int // number of rules: 0 for no filter, -1 for docker's profile
	}{
		{"", false, -1}, {"default", false, -1}, {"unconfined", false, 0}, {file, false, 4},
		{"", true, 0}, {"default", true, -1}, {"unconfined", true, 0}, {file, true, 4},
	} {
		s, err := New(image(t, redis), Options{Seccomp: c.mode, Privileged: c.privileged, Host: testHost})
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		want := c.want
		if want < 0 {
			p, err := DefaultSeccomp(s.Process.Capabilities.Bounding)
			if err != nil {
				t.Fatal(err)
			}
			want = len(p.Syscalls)
		}
		got := 0
		if s.Linux.Seccomp != nil {
			got = len(s.Linux.Seccomp.Syscalls)
		}
		if got != want {
			t.Errorf("%+v: %d rules, not %d", c, got, want)
		}
	}
	if _, err := New(image(t, redis), Options{Seccomp: filepath.Join(t.TempDir(), "none"), Host: testHost}); !errdefs.IsNotFound(err) {
		t.Errorf("missing profile: %v", err)
	}
}

// Annotations switch features of runtimes, so labels by an image's author never become annotations.
func TestLabelsAreNoAnnotations(t *testing.T) {
	const hostile = `{"created":5,"author":["me"],"variant":8,"os.version":10,"os.features":"x","os":"linux","architecture":"arm64","config":{"Cmd":["x"],"StopSignal":%s,
"ExposedPorts":{"80/tcp":{}},"Labels":{"run.oci.seccomp_bpf_data":"BgAAAAAA/38=","run.oci.keep_original_groups":"1",
"run.oci.pidfd_receiver":"/run/x","run.oci.hooks.stdout":"/x","run.oci.handler":"krun","run.oci.systemd.force_cgroup_v1":"/x",
"org.criu.config":"/x","bundle":"/x","org.systemd.property.Description":"'x'","module.wasm.image/variant":"compat",
"org.opencontainers.image.stopSignal":"KILL","org.opencontainers.image.os":"x","":"x"}}}`
	for signal, want := range map[string]map[string]string{
		`"SIGQUIT"`: {stopSignalAnnotation: "SIGQUIT"}, `15`: {stopSignalAnnotation: "15"}, `"RTMIN+3"`: {stopSignalAnnotation: "RTMIN+3"},
		`"run.oci"`: {}, `""`: {}, `null`: {}, `["TERM"]`: {}, `-1`: {}, `99999999999999999999`: {},
	} {
		s, err := New(image(t, fmt.Sprintf(hostile, signal)), Options{Host: testHost})
		if err != nil || !maps.Equal(s.Annotations, want) {
			t.Errorf("stop signal %s: %v %v", signal, s, err)
		}
	}
	own := map[string]string{"run.oci.handler": "krun", stopSignalAnnotation: "INT"}
	s, err := New(image(t, fmt.Sprintf(hostile, `"TERM"`)), Options{Host: testHost, Annotations: own})
	if err != nil || !maps.Equal(s.Annotations, own) {
		t.Errorf("the caller's: %v %v", s, err)
	}
}

func TestSysctls(t *testing.T) {
	both := map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}
	user := testHost
	user.UserNamespace = true
	for _, c := range []struct {
		o    Options
		want map[string]string // nil means InvalidArgument
	}{
		{Options{Host: testHost}, both},
		{Options{Host: testHost, Privileged: true, Network: "none"}, both},
		{Options{Host: testHost, Network: "/run/netns/x"}, both},
		{Options{Host: testHost, Network: "host"}, map[string]string{}},
		{Options{Host: testHost, Network: "/proc/self/ns/net"}, map[string]string{}},
		{Options{Host: user}, map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}},
		{Options{Host: Host{Capabilities: capabilities}}, map[string]string{}},
		{
			Options{Host: testHost, Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "1024", "kernel.shmmax": "5", "fs.mqueue.msg_max": "9"}},
			map[string]string{"net.ipv4.ip_unprivileged_port_start": "1024", "net.ipv4.ping_group_range": "0 2147483647", "kernel.shmmax": "5", "fs.mqueue.msg_max": "9"},
		},
		{Options{Host: testHost, Network: "host", Sysctls: map[string]string{"kernel.sem": "1 2 3 4"}}, map[string]string{"kernel.sem": "1 2 3 4"}},
		{Options{Host: testHost, Network: "host", Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}}, nil},
		{Options{Host: testHost, Network: "/proc/self/ns/net", Sysctls: map[string]string{"net.ipv4.ip_forward": "1"}}, nil},
		{Options{Host: testHost, Sysctls: map[string]string{"kernel.core_pattern": "|/x"}}, nil},
		{Options{Host: testHost, Sysctls: map[string]string{"net/../kernel/core_pattern": "|/x"}}, nil},
		{Options{Host: testHost, Sysctls: map[string]string{"net...kernel.core_pattern": "|/x"}}, nil},
		{Options{Host: testHost, Sysctls: map[string]string{"": "1"}}, nil},
		{Options{Host: testHost, Sysctls: map[string]string{"net": "1"}}, nil},
		{Options{Host: testHost, Sysctls: map[string]string{"net.a": "\x00"}}, nil},
	} {
		s, err := New(image(t, redis), c.o)
		switch {
		case c.want == nil && !errdefs.IsInvalidArgument(err):
			t.Errorf("%+v: %v", c.o, err)
		case c.want != nil && (err != nil || !maps.Equal(s.Linux.Sysctl, c.want)):
			t.Errorf("%+v: %v %v", c.o, s.Linux.Sysctl, err)
		}
	}
}

func TestSecurityModules(t *testing.T) {
	host := testHost
	host.AppArmor, host.SELinux = true, true
	const label, file = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
	s, err := New(image(t, redis), Options{AppArmor: "docker-default", SELinuxLabel: label, SELinuxMountLabel: file, Host: host})
	if err != nil || s.Process.ApparmorProfile != "docker-default" || s.Process.SelinuxLabel != label || s.Linux.MountLabel != file {
		t.Errorf("%+v %v", s, err)
	}
	s, err = New(image(t, redis), Options{AppArmor: "unconfined", Host: testHost})
	if err != nil || s.Process.ApparmorProfile != "" || s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "" {
		t.Errorf("%+v %v", s, err)
	}
	for _, o := range []Options{{AppArmor: "docker-default"}, {SELinuxLabel: label}, {SELinuxMountLabel: file}} {
		o.Host = testHost
		if _, err := New(image(t, redis), o); !errdefs.IsNotImplemented(err) {
			t.Errorf("%+v where the host has none: %v", o, err)
		}
	}
	host.Profiles = profileNames("docker-default (enforce)\n/usr/bin/x y (complain)\n")
	for profile, ok := range map[string]bool{"docker-default": true, "/usr/bin/x y": true, "other": false} {
		if _, err := New(image(t, redis), Options{AppArmor: profile, Host: host}); ok && err != nil || !ok && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("profile %s: %v", profile, err)
		}
	}
	for _, bad := range []string{"x", "a:b", ":b:c", "a:b:", "a:b:c d", "a:b:c\x00"} {
		if _, err := New(image(t, redis), Options{SELinuxLabel: bad, Host: host}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestSeccomp(t *testing.T) {
	s, err := ReadSeccomp(strings.NewReader(profile), []string{"CAP_SYS_ADMIN"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range s.Syscalls {
		names = append(names, c.Names...)
	}
	if strings.Join(names, " ") != "read write mount" || s.DefaultErrnoRet == nil || *s.DefaultErrnoRet != 1 || len(s.Architectures) != 2 {
		t.Errorf("%q %+v", names, s)
	}
	for _, bad := range []string{"", "{}", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}`} {
		if _, err := ReadSeccomp(strings.NewReader(bad), nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestUmoci compares our result with umoci's for the same image. A table lists the intended differences.
func TestUmoci(t *testing.T) {
	testenv.Require(t, "umoci")
	dir := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("umoci", args...).CombinedOutput(); err != nil {
			t.Fatalf("umoci %q: %v: %s", args, err, out)
		}
	}
	layout := filepath.Join(dir, "image")
	run("init", "--layout", layout)
	run("new", "--image", layout+":x")
	run("config", "--image", layout+":x", "--config.entrypoint", "/e", "--config.cmd", "c", "--config.env", "A=b",
		"--config.workingdir", "/w", "--config.user", "alice", "--config.label", "k=v", "--config.exposedports", "80/tcp", "--config.stopsignal", "SIGINT")
	rootfs := filepath.Join(dir, "rootfs")
	testenv.Write(t, filepath.Join(rootfs, "etc/passwd"), passwd)
	testenv.Write(t, filepath.Join(rootfs, "etc/group"), group)
	run("raw", "runtime-config", "--image", layout+":x", "--rootfs", rootfs, filepath.Join(dir, "config.json"))
	var theirs specs.Spec
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &theirs); err != nil {
		t.Fatal(err)
	}

	var img *Image
	blobs, _ := filepath.Glob(filepath.Join(layout, "blobs/sha256/*"))
	for _, name := range blobs {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if i, err := ReadImage(f); err == nil && i.Config.User != "" {
			img = i
		}
		f.Close()
	}
	if img == nil {
		t.Fatal("no config in umoci's layout")
	}
	ours, err := New(img, Options{Rootfs: rootfs, Host: testHost})
	if err != nil {
		t.Fatal(err)
	}
	// Labels are left out intentionally. Other annotations about the image are of no use to a runtime.
	if v := theirs.Annotations[stopSignalAnnotation]; v == "" || ours.Annotations[stopSignalAnnotation] != v {
		t.Errorf("stop signal %q, umoci has %q", ours.Annotations[stopSignalAnnotation], v)
	}
	for what, pair := range map[string][2]any{
		"args":      {ours.Process.Args, theirs.Process.Args},
		"cwd":       {ours.Process.Cwd, theirs.Process.Cwd},
		"uid":       {ours.Process.User.UID, theirs.Process.User.UID},
		"gid":       {ours.Process.User.GID, theirs.Process.User.GID},
		"namespace": {sorted(ours.Linux.Namespaces), sorted(theirs.Linux.Namespaces)},
	} {
		if !reflect.DeepEqual(pair[0], pair[1]) {
			t.Errorf("%s: %v, umoci has %v", what, pair[0], pair[1])
		}
	}
	justified := map[string]string{
		"TERM=xterm":             "no terminal was asked for; umoci assumes one",
		"additionalGids":         "ours has the primary group too, as docker does",
		"capabilities":           "docker's 14 instead of runc's 3, and none inheritable or ambient",
		"noNewPrivileges":        "docker's default is false",
		"rlimits":                "docker sets none",
		"mounts for volumes":     "the container's own snapshot holds them: a tmpfs would hide the image's files",
		"hostname":               "the caller's; a filter knows no container",
		"masked, readonly paths": "docker's longer list",
	}
	for _, v := range theirs.Process.Env {
		if !slices.Contains(ours.Process.Env, v) && justified[v] == "" {
			t.Errorf("variable %s is umoci's alone", v)
		}
	}
	var masked []string
	for _, p := range theirs.Linux.MaskedPaths {
		if !slices.Contains(ours.Linux.MaskedPaths, p) {
			masked = append(masked, p)
		}
	}
	for _, p := range theirs.Linux.ReadonlyPaths {
		if !slices.Contains(append(ours.Linux.ReadonlyPaths, ours.Linux.MaskedPaths...), p) {
			masked = append(masked, p)
		}
	}
	if len(masked) > 0 {
		t.Errorf("umoci masks or protects %q too", masked)
	}
	for _, m := range theirs.Mounts {
		if !slices.ContainsFunc(ours.Mounts, func(o specs.Mount) bool { return o.Destination == m.Destination && o.Type == m.Type }) {
			t.Errorf("umoci mounts %s on %s too", m.Type, m.Destination)
		}
	}
}

func sorted(ns []specs.LinuxNamespace) []string {
	var s []string
	for _, n := range ns {
		s = append(s, string(n.Type)+n.Path)
	}
	slices.Sort(s)
	return s
}
