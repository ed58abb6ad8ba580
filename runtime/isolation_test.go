package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// With TEST_SYSCALLS set, the test binary tries system calls, in a container for example, and prints the error of each.
// That happens before TestMain.
func init() {
	if os.Getenv("TEST_SYSCALLS") == "" {
		return
	}
	call := func(name string, number uintptr, a ...uintptr) {
		a = append(a, make([]uintptr, 6-len(a))...)
		_, _, errno := unix.RawSyscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
		fmt.Println(name, unix.ErrnoName(errno))
	}
	var b [128]byte // all zero: a call that is not filtered fails for another reason, or does no harm
	p := uintptr(unsafe.Pointer(&b))
	session := ^uintptr(2) // KEY_SPEC_SESSION_KEYRING
	call("keyctl", unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID, session)
	call("add_key", unix.SYS_ADD_KEY, p, p, p, 0, session)
	call("request_key", unix.SYS_REQUEST_KEY, p, p, p, session)
	call("bpf", unix.SYS_BPF, 99, p, 128)
	call("userfaultfd", unix.SYS_USERFAULTFD, 1<<20)
	call("io_uring_setup", unix.SYS_IO_URING_SETUP, 0, p)
	call("unshare", unix.SYS_UNSHARE, unix.CLONE_NEWUSER|unix.CLONE_NEWNET)
	call("getpid", unix.SYS_GETPID)
	os.Exit(0)
}

// errnos makes these calls in a container, and returns the error of each; "" means success.
func (m *machine) errnos(o spec.Options) map[string]string {
	m.Helper()
	self, err := os.Executable()
	if err != nil {
		m.Fatal(err)
	}
	o.Args, o.Env = []string{"/probe"}, []string{"TEST_SYSCALLS=1"}
	// The binary may be linked to the host's libraries.
	for source, target := range map[string]string{self: "/probe", "/lib": "/lib", "/lib64": "/lib64", "/usr/lib": "/usr/lib"} {
		if _, err := os.Stat(source); err == nil {
			o.Mounts = append(o.Mounts, specs.Mount{Type: "bind", Source: source, Destination: target, Options: []string{"rbind", "ro"}})
		}
	}
	m.spec(o)
	out, errs, status := m.run("")
	if status != 0 || errs != "" {
		m.Fatalf("status %d, %q", status, errs)
	}
	got := map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		name, errno, _ := strings.Cut(line, " ")
		got[name] = errno
	}
	return got
}

// Without privileges, a container's process can't use the parts of the kernel that docker's profile forbids, unless a
// flag allows it.
func TestIsolation(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		calls := strings.Fields("keyctl add_key request_key bpf userfaultfd io_uring_setup unshare")
		for _, c := range []struct {
			o        spec.Options
			filtered bool
		}{
			{spec.Options{User: "1000"}, true},
			{spec.Options{User: "1000", Seccomp: "default", Privileged: true, CapDrop: []string{"ALL"}}, true},
			{spec.Options{User: "1000", Seccomp: "unconfined"}, false},
			{spec.Options{User: "1000", Privileged: true}, false},
		} {
			got := m.errnos(c.o)
			if got["getpid"] != "" {
				m.Errorf("%+v: %v", c.o, got)
			}
			for _, name := range calls {
				errno, ok := got[name]
				if !ok || c.filtered && errno != "EPERM" {
					m.Errorf("%+v: %s is let through: %q", c.o, name, errno)
				}
			}
			// The kernel itself may refuse the others without a capability.
			if !c.filtered && (got["add_key"] == "EPERM" || got["keyctl"] == "EPERM") {
				m.Errorf("%+v: %v", c.o, got)
			}
		}
	})
}

// Any user may listen on a low port and send echo requests, but not with a user namespace.
func TestDefaultSysctls(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		show := []string{"sh", "-c", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"}
		group := "0\t2147483647"
		if spec.ThisHost().UserNamespace {
			group = "1\t0"
		}
		for port, sysctls := range map[string]map[string]string{"0": nil, "1024": {"net.ipv4.ip_unprivileged_port_start": "1024"}} {
			m.spec(spec.Options{Args: show, Sysctls: sysctls})
			if out, errs, status := m.run(""); out != port+"\n"+group+"\n" || status != 0 {
				m.Errorf("%v: %q, %q, status %d", sysctls, out, errs, status)
			}
		}
		// An existing network namespace gets these values too; the host's keeps its own.
		name := "/proc/sys/net/ipv4/ip_unprivileged_port_start"
		before, err := os.ReadFile(name)
		if err != nil {
			m.Skip(err)
		}
		for _, network := range []string{"host", "/proc/self/ns/net"} {
			m.spec(spec.Options{Args: []string{"true"}, Network: network})
			if _, errs, status := m.run(""); status != 0 {
				m.Errorf("%s: status %d, %q", network, status, errs)
			}
		}
		if after, err := os.ReadFile(name); err != nil || string(after) != string(before) {
			m.Errorf("the host's %s: %q, before %q, %v", name, after, before, err)
		}
	})
}

// A further process has the home directory of its own user, TERM if it has a terminal, and the container's umask, not
// the caller's.
func TestExecEnvironment(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		rootfs := filepath.Join(m.bundle, "rootfs")
		testenv.Write(t, filepath.Join(rootfs, "etc/passwd"), "root:x:0:0::/root:/bin/sh\nann:x:1000:100::/home/ann:/bin/sh\n")
		defer unix.Umask(unix.Umask(0o077))
		const show = "echo $HOME,$TERM,$A,$(umask)"
		m.spec(spec.Options{Args: []string{"sh", "-c", show}, Rootfs: rootfs, Env: []string{"A=1"}})
		if out, errs, status := m.run(""); out != "/root,,1,0022\n" {
			m.Errorf("run: %q, %q, status %d", out, errs, status)
		}
		for i, c := range []struct {
			env  []string // of the container
			x    Exec
			want string
		}{
			{nil, Exec{}, "/root,,,0022"},
			{nil, Exec{User: "ann"}, "/home/ann,,,0022"},
			{nil, Exec{User: "1000:5"}, "/home/ann,,,0022"},
			{nil, Exec{User: "77"}, "/,,,0022"},
			{nil, Exec{User: "ann", Env: []string{"HOME=/mine", "A=2"}}, "/mine,,2,0022"},
			{nil, Exec{User: "ann", Env: []string{"HOME"}}, ",,,0022"},
			{[]string{"HOME=/set"}, Exec{User: "ann"}, "/set,,,0022"},
			{nil, Exec{Terminal: true}, "/root,xterm,,0022"},
			{[]string{"TERM=vt100"}, Exec{Terminal: true}, "/root,vt100,,0022"},
			{nil, Exec{Terminal: true, Env: []string{"TERM=dumb"}}, "/root,dumb,,0022"},
		} {
			m.spec(spec.Options{Args: []string{"sleep", "1000"}, Rootfs: rootfs, Env: c.env})
			container := m.detached(Record{ID: fmt.Sprintf("test-exec-environment-%d", i)})
			p, err := container.further(Exec{Args: []string{"sh", "-c", show}, Env: c.x.Env, User: c.x.User, Terminal: c.x.Terminal}, m.info(container).Pid)
			if err != nil {
				m.Fatal(err)
			}
			// The runtime sets HOME for a process without one.
			env := map[string]string{}
			for _, v := range p.Env {
				name, value, _ := strings.Cut(v, "=")
				env[name] = value
			}
			if got := fmt.Sprintf("%s,%s,%s,0022", env["HOME"], env["TERM"], env["A"]); got != c.want {
				m.Errorf("%+v: %s, not %s", c.x, got, c.want)
			}
			if !c.x.Terminal && env["HOME"] != "" {
				c.x.Args = []string{"sh", "-c", show}
				id, err := container.StartExec(t.Context(), c.x)
				if err != nil {
					m.Fatal(err)
				}
				if _, err := container.proc(id).Wait(t.Context()); err != nil {
					m.Fatal(err)
				}
				var out strings.Builder
				if err := container.proc(id).Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error { _, err := out.Write(e.Text); return err }); err != nil {
					m.Fatal(err)
				}
				if got := strings.TrimSpace(out.String()); got != c.want {
					m.Errorf("%+v: the process has %s, not %s", c.x, got, c.want)
				}
			}
			if _, err := container.Remove(t.Context(), true); err != nil {
				m.Fatal(err)
			}
		}
		// A process's configuration may be larger than a pipe.
		m.spec(spec.Options{Args: []string{"sleep", "1000"}, Rootfs: rootfs})
		container := m.detached(Record{ID: "test-exec-large"})
		if status, err := container.Exec(t.Context(), Exec{Args: []string{"true", strings.Repeat("a", 100_000)}}); err != nil || status != 0 {
			m.Errorf("a large argument: status %d, %v", status, err)
		}
		if _, err := container.Remove(t.Context(), true); err != nil {
			m.Fatal(err)
		}
		const x = "caf\xe9"
		container = m.detached(Record{ID: "test-exec-bytes"})
		for _, e := range []Exec{{Args: []string{x}}, {Args: []string{"true"}, Env: []string{"A=" + x}}, {Args: []string{"true"}, Cwd: "/" + x}, {Args: []string{"true"}, User: x}} {
			if id, err := container.StartExec(t.Context(), e); !errdefs.IsInvalidArgument(err) {
				m.Errorf("%+v: %s %v", e, id, err)
			}
		}
		if _, err := container.Label(map[string]string{"a": x}); !errdefs.IsInvalidArgument(err) {
			m.Errorf("label: %v", err)
		}
		if _, err := container.Remove(t.Context(), true); err != nil {
			m.Fatal(err)
		}
	})
}
