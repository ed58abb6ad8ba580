package network

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

const addEnv = "NETWORK_TEST_ADD"

// The test binary also serves as a process that makes a network.
func TestMain(m *testing.M) {
	if dir := os.Getenv(addEnv); dir != "" {
		w := world{state: filepath.Join(dir, "state"), plugins: filepath.Join(dir, "plugins")}
		n, err := Open(w.state, "default", []string{w.plugins})
		if err == nil {
			_, err = n.Add(context.Background(), "x", Wanted{config: w.config("first", "second"), ports: nil})
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// world is a state directory, and plugins that log their calls.
type world struct{ state, plugins, log string }

// plugin logs its verb and name. It fails, waits or answers as files beside it say.
const plugin = `#!/bin/sh
cd "${0%/*}" || exit
echo "$CNI_COMMAND ${0##*/} $CNI_CONTAINERID $CNI_IFNAME" >> log
cat > "input.$CNI_COMMAND.${0##*/}"
if [ -e "fail.$CNI_COMMAND.${0##*/}" ]; then printf '%s\n' '{"cniVersion":"1.0.0","code":100,"msg":"out of\nluck"}'; exit 1; fi
if [ -e "wait.$CNI_COMMAND.${0##*/}" ]; then : > waiting; while [ -e "wait.$CNI_COMMAND.${0##*/}" ]; do sleep 0.02; done; fi
[ "$CNI_COMMAND" = ADD ] || exit 0
[ -e "$CNI_NETNS" ] || exit 1
echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.8.7/24"}]}'
`

func newWorld(t *testing.T) (world, *Networks) {
	t.Helper()
	testenv.Require(t, "root")
	dir := t.TempDir()
	w := world{filepath.Join(dir, "state"), filepath.Join(dir, "plugins"), filepath.Join(dir, "plugins", "log")}
	if err := os.Mkdir(w.plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"first", "second"} {
		if err := os.WriteFile(filepath.Join(w.plugins, name), []byte(plugin), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n, err := Open(w.state, "default", []string{w.plugins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, _ := filepath.Glob(filepath.Join(w.state, "networks", "*", "[ne]*"))
		for _, m := range mounts {
			_ = unmountAll(m)
		}
	})
	return w, n
}

func (w world) config(plugins ...string) *libcni.NetworkConfigList {
	var all []map[string]any
	for _, p := range plugins {
		all = append(all, map[string]any{"type": p, "capabilities": map[string]bool{"portMappings": p == "second"}})
	}
	b, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "test", "plugins": all})
	if err != nil {
		panic(err)
	}
	c, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		panic(err)
	}
	return c
}

func (w world) touch(t *testing.T, name string) (remove func()) {
	t.Helper()
	path := filepath.Join(w.plugins, name)
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return func() { _ = os.Remove(path) }
}

// asked returns the calls of plugins since the last call of asked.
func (w world) asked() string {
	b, _ := os.ReadFile(w.log)
	_ = os.Remove(w.log)
	return strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "; ")
}

// empty checks that nothing is left, not even a mount.
func (w world) empty(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(w.state, "networks", "*"))
	table, merr := os.ReadFile("/proc/self/mountinfo")
	if err != nil || merr != nil || len(left) > 0 || strings.Contains(string(table), w.state) {
		t.Errorf("left: %q; %v", left, err)
	}
}

func TestLife(t *testing.T) {
	w, n := newWorld(t)
	ctx := t.Context()
	ports := []Port{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
	got, err := n.Add(ctx, "x", Wanted{config: w.config("first", "second"), ports: ports})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != "x" || got.Name != "test" || !slices.Equal(got.Addresses, []string{"10.9.8.7/24"}) || !slices.Equal(got.Ports, ports) {
		t.Errorf("%+v", got)
	}
	if a := w.asked(); a != "ADD first default--x eth0; ADD second default--x eth0" {
		t.Errorf("asked %q", a)
	}
	if b, _ := os.ReadFile(filepath.Join(w.plugins, "input.ADD.second")); !strings.Contains(string(b), `"hostPort":8080`) {
		t.Errorf("the second plugin got %s", b)
	}
	if b, _ := os.ReadFile(filepath.Join(w.plugins, "input.ADD.first")); strings.Contains(string(b), "hostPort") {
		t.Errorf("the first plugin, which maps no ports, got %s", b)
	}
	// The namespace is a new one, with loopback up.
	c := exec.Command("nsenter", "--net="+got.Path, "cat", "/proc/net/dev", "/proc/net/fib_trie")
	if out, err := c.CombinedOutput(); err != nil || strings.Contains(string(out), "eth0") || !strings.Contains(string(out), "127.0.0.1") {
		t.Errorf("%s, %v", out, err)
	}
	if _, err := n.Add(ctx, "x", Wanted{config: w.config("first"), ports: nil}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("once more: %v", err)
	}
	other, err := Open(w.state, "other", []string{w.plugins})
	if err != nil {
		t.Fatal(err)
	}
	if all, err := other.List(ctx); err != nil || len(all) != 0 {
		t.Errorf("another namespace has %v, %v", all, err)
	}
	if err := other.Delete(ctx, "x"); err != nil {
		t.Error(err)
	}
	all, err := n.List(ctx)
	if err != nil || len(all) != 1 || all[0].Path != got.Path || !slices.Equal(all[0].Addresses, got.Addresses) || !slices.Equal(all[0].Ports, ports) {
		t.Errorf("list: %+v, %v", all, err)
	}
	w.asked()
	at, id, err := n.Locate(got.Path)
	if err != nil || id != "x" || at.dir != n.dir || at.namespace != n.namespace {
		t.Errorf("at %s: %+v, %s, %v", got.Path, at, id, err)
	}
	// Files in other places may have been written by anybody.
	for _, path := range []string{"/elsewhere/networks/x/netns", "", "netns", "/netns", "/networks/x/ns", "networks/x/netns", "/a/networks/../netns", "/a/networks/a+b+c/netns"} {
		if _, _, err := n.Locate(path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("at %q: %v", path, err)
		}
	}
	for range 2 {
		if err := at.Delete(ctx, "x"); err != nil {
			t.Error(err)
		}
	}
	if a := w.asked(); a != "DEL second default--x eth0; DEL first default--x eth0" {
		t.Errorf("asked %q", a)
	}
	w.empty(t)
}

// A network that is down is disconnected. When it comes up, it is connected as requested.
func TestDownAndUp(t *testing.T) {
	w, n := newWorld(t)
	ctx := t.Context()
	if _, err := n.Up(ctx, "x"); !errdefs.IsNotFound(err) {
		t.Errorf("one that isn't there: %v", err)
	}
	if err := n.Down(ctx, "x"); err != nil {
		t.Errorf("one that isn't there: %v", err)
	}
	ports := []Port{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}}
	made, err := n.Add(ctx, "x", Wanted{config: w.config("first", "second"), ports: ports})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Up(ctx, "x"); err != nil {
		t.Errorf("one that is up: %v", err)
	}
	w.asked()
	for range 2 {
		if err := n.Down(ctx, "x"); err != nil {
			t.Fatal(err)
		}
		if a := w.asked(); !strings.Contains(a, "DEL second default--x eth0; DEL first default--x eth0") {
			t.Errorf("down asked %q", a)
		}
		if all, err := n.List(ctx); err != nil || len(all) > 0 {
			t.Errorf("what is down is listed: %v, %v", all, err)
		}
		if _, err := os.Lstat(made.Path); err == nil {
			t.Error("its namespace is left")
		}
	}
	fails := w.touch(t, "fail.ADD.second")
	if _, err := n.Up(ctx, "x"); err == nil {
		t.Error("a plugin failed, and it is up")
	}
	fails()
	w.asked()
	again, err := n.Up(ctx, "x")
	if err != nil || again.Path != made.Path || !slices.Equal(again.Ports, ports) {
		t.Errorf("%+v, %v", again, err)
	}
	if a := w.asked(); !strings.HasSuffix(a, "ADD first default--x eth0; ADD second default--x eth0") {
		t.Errorf("up asked %q", a)
	}
	if out, err := exec.Command("nsenter", "--net="+again.Path, "true").CombinedOutput(); err != nil {
		t.Errorf("%s, %v", out, err)
	}
	if err := n.Down(ctx, "x"); err != nil {
		t.Error(err)
	}
	if err := n.Delete(ctx, "x"); err != nil {
		t.Error(err)
	}
	w.empty(t)
}

func TestFailures(t *testing.T) {
	w, n := newWorld(t)
	ctx := t.Context()
	ports := []Port{{HostPort: 1, ContainerPort: 1, Protocol: "tcp"}}
	if _, err := n.Add(ctx, "x", Wanted{config: w.config("first"), ports: ports}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("ports that nobody maps: %v", err)
	}
	if _, err := n.Add(ctx, "x", Wanted{config: w.config("first", "absent"), ports: nil}); !errdefs.IsNotImplemented(err) {
		t.Errorf("a plugin that isn't there: %v", err)
	}
	if _, err := n.Add(ctx, "../x", Wanted{config: w.config("first"), ports: nil}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no ID: %v", err)
	}
	w.empty(t)
	if a := w.asked(); a != "" {
		t.Errorf("asked %q", a)
	}
	// If one plugin fails, the others are undone, and the error is one line.
	heal := w.touch(t, "fail.ADD.second")
	_, err := n.Add(ctx, "x", Wanted{config: w.config("first", "second"), ports: nil})
	if err == nil || strings.Contains(err.Error(), "\n") || !strings.Contains(err.Error(), "out of luck") {
		t.Errorf("%v", err)
	}
	if a := w.asked(); a != "ADD first default--x eth0; ADD second default--x eth0; DEL second default--x eth0; DEL first default--x eth0" {
		t.Errorf("asked %q", a)
	}
	w.empty(t)
	heal()
	// If undoing fails too, the network is kept. Delete, or the next Add, tries again.
	heal = w.touch(t, "fail.ADD.second")
	healDel := w.touch(t, "fail.DEL.first")
	if _, err := n.Add(ctx, "x", Wanted{config: w.config("first", "second"), ports: nil}); err == nil {
		t.Error("no failure")
	}
	if err := n.Delete(ctx, "x"); err == nil {
		t.Error("no failure")
	}
	if all, err := n.List(ctx); err != nil || len(all) > 0 {
		t.Errorf("half a network is listed: %v, %v", all, err)
	}
	heal()
	healDel()
	w.asked()
	if _, err := n.Add(ctx, "x", Wanted{config: w.config("first", "second"), ports: nil}); err != nil {
		t.Fatal(err)
	}
	if a := w.asked(); !strings.HasPrefix(a, "DEL second default--x eth0; DEL first default--x eth0; ADD first") {
		t.Errorf("asked %q", a)
	}
	if err := n.Delete(ctx, "x"); err != nil {
		t.Error(err)
	}
	w.empty(t)
}

// Delete removes what a process has left that was killed while a plugin ran.
func TestKilled(t *testing.T) {
	for _, at := range []string{"wait.ADD.first", "wait.ADD.second"} {
		w, n := newWorld(t)
		release := w.touch(t, at)
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), addEnv+"="+filepath.Dir(w.state))
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := os.Stat(filepath.Join(w.plugins, "waiting")); err == nil {
				break
			}
		}
		if err := n.Delete(t.Context(), "x"); !errdefs.IsUnavailable(err) {
			t.Errorf("beside who makes it: %v", err)
		}
		_ = c.Process.Kill()
		_ = c.Wait()
		release()
		if all, err := n.List(t.Context()); err != nil || len(all) > 0 {
			t.Errorf("half a network is listed: %v, %v", all, err)
		}
		if err := n.Delete(t.Context(), "x"); err != nil {
			t.Error(err)
		}
		if a := w.asked(); !strings.Contains(a, "DEL second default--x eth0; DEL first default--x eth0") {
			t.Errorf("asked %q", a)
		}
		w.empty(t)
	}
	// killed when only the directory, or also the lock, existed
	w, n := newWorld(t)
	for _, file := range []string{"", "lock", "request.json.new"} {
		dir := filepath.Join(w.state, "networks", "x")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if file != "" {
			if err := os.WriteFile(filepath.Join(dir, file), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.Delete(t.Context(), "x"); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		w.empty(t)
	}
	// a namespace that was unmounted by hand
	if _, err := n.Add(t.Context(), "x", Wanted{config: w.config("first"), ports: nil}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(filepath.Join(w.state, "networks", "x", "netns"), 0); err != nil {
		t.Error(err)
	}
	if err := n.Delete(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	w.empty(t)
}

func TestPorts(t *testing.T) {
	for text, want := range map[string]Port{
		"8080:80":                {"", 8080, 80, "tcp"},
		"8080:80/UDP":            {"", 8080, 80, "udp"},
		"127.0.0.1:53:5353/sctp": {"127.0.0.1", 53, 5353, "sctp"},
		"[::1]:1:65535":          {"::1", 1, 65535, "tcp"},
	} {
		got, err := ParsePort(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if again, err := ParsePort(got.String()); err != nil || again != got {
			t.Errorf("%s: %s: %+v, %v", text, got, again, err)
		}
	}
	for _, text := range []string{"", "80", ":80", "80:", "0:80", "80:0", "80:65536", "a:b", "80:80/icmp", "80:80/", "host:1:2", "::1:1:2", "[1.2.3.4]:1:2", "[fe80::1%eth0]:1:2", "1:2:3:4", "-1:2", "+1:2"} {
		if p, err := ParsePort(text); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %+v, %v", text, p, err)
		}
	}
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"10-bad.conflist": "{",
		"20-one.conf":     `{"cniVersion":"1.0.0","name":"one","type":"bridge"}`,
		"30-two.conflist": `{"cniVersion":"1.0.0","name":"two","plugins":[{"type":"ptp"},{"type":"portmap"}]}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, plugins := range map[string]int{"one": 1, "two": 2, filepath.Join(dir, "30-two.conflist"): 2} {
		if c, err := Config(name, dir); err != nil || len(c.Plugins) != plugins {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
	if _, err := Config("three", dir); err == nil || !strings.Contains(err.Error(), "10-bad.conflist") {
		t.Errorf("beside a file that can't be used: %v", err)
	}
	if _, err := Config(filepath.Join(dir, "10-bad.conflist"), dir); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no configuration: %v", err)
	}
	if _, err := Config("three", filepath.Join(dir, "none")); !errdefs.IsNotFound(err) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := Config("./none", dir); !errdefs.IsNotFound(err) {
		t.Errorf("no file: %v", err)
	}
	// A user's own configuration replaces the built-in one.
	if err := os.WriteFile(filepath.Join(dir, "mine.conf"), []byte(`{"cniVersion":"1.0.0","name":"bridge","type":"macvlan"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if c, err := Config(Bridge, dir); err != nil || c.Plugins[0].Network.Type != "macvlan" {
		t.Errorf("the user's bridge: %+v, %v", c, err)
	}
}

// Chains that another network uses are kept, with the rules that lead to them.
func TestIdleChains(t *testing.T) {
	const (
		nat = "*nat\n:PREROUTING ACCEPT [0:0]\n:CNI-HOSTPORT-DNAT - [0:0]\n:CNI-HOSTPORT-SETMARK - [0:0]\n:OTHER - [0:0]\n" +
			"-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n-A PREROUTING -j OTHER\n-A CNI-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000\n"
		filter = "*filter\n:FORWARD DROP [0:0]\n:CNI-FORWARD - [0:0]\n:DISTKIT-ADMIN - [0:0]\n-A FORWARD -m comment --comment \"CNI firewall plugin rules\" -j CNI-FORWARD\n" +
			"-A CNI-FORWARD -j DISTKIT-ADMIN\n-A CNI-FORWARD -s 10.86.0.9/32 -j ACCEPT\n-A DISTKIT-ADMIN -o distkit0 -j ACCEPT\n"
		end         = "COMMIT\n"
		withoutLeft = "*filter\n-D CNI-FORWARD -s 10.86.0.9/32 -j ACCEPT\nCOMMIT\n"
		natGone     = "*nat\n-D PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n-F CNI-HOSTPORT-DNAT\n-F CNI-HOSTPORT-SETMARK\n-X CNI-HOSTPORT-DNAT\n-X CNI-HOSTPORT-SETMARK\nCOMMIT\n"
		filterGone  = "*filter\n-D FORWARD -m comment --comment \"CNI firewall plugin rules\" -j CNI-FORWARD\n-D CNI-FORWARD -s 10.86.0.9/32 -j ACCEPT\n" +
			"-F CNI-FORWARD\n-F DISTKIT-ADMIN\n-X CNI-FORWARD\n-X DISTKIT-ADMIN\nCOMMIT\n"
	)
	for _, c := range []struct{ what, rules, want string }{
		{"nothing", "", ""},
		{"none of CNI's", "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n*filter\n:FORWARD DROP [0:0]\nCOMMIT\n", ""},
		{"idle", nat + end + filter + end, natGone + filterGone},
		{"a port of another program", nat + "-A CNI-HOSTPORT-DNAT -p tcp -j CNI-DN-1\n" + end + filter + end, filterGone},
		{"another chain needs the mark", nat + "-A OTHER -j CNI-HOSTPORT-SETMARK\n" + end + filter + end, filterGone},
		{"an address of another program", nat + end + filter + "-A CNI-FORWARD -s 10.87.0.2/32 -j ACCEPT\n" + end, natGone + withoutLeft},
		{"an administrator's override", nat + end + filter + "-A DISTKIT-ADMIN -s 192.0.2.0/24 -j DROP\n" + end, natGone + withoutLeft},
		{"overrides of another program", nat + end + filter + "-A CNI-FORWARD -j CNI-ADMIN\n" + end, natGone + withoutLeft},
	} {
		if got := withoutIdleChains(c.rules); got != c.want {
			t.Errorf("%s:\n%s\nnot\n%s", c.what, got, c.want)
		}
	}
}

func TestOverlaps(t *testing.T) {
	port := func(s string) Port {
		p, err := ParsePort(s)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"80:1", "80:2", true}, {"80:1", "81:1", false}, {"80:1", "80:1/udp", false},
		{"127.0.0.1:80:1", "80:2", true}, {"127.0.0.1:80:1", "127.0.0.2:80:1", false}, {"[::1]:80:1", "80:1", true},
		{"0.0.0.0:80:1", "127.0.0.1:80:1", true}, {"0.0.0.0:80:1", "[::1]:80:1", false}, {"[::]:80:1", "[::1]:80:1", true}, {"0.0.0.0:80:1", "[::]:80:1", false},
	} {
		if a, b := port(c.a), port(c.b); a.overlaps(b) != c.want || b.overlaps(a) != c.want {
			t.Errorf("%s and %s: %v, %v", c.a, c.b, a.overlaps(b), b.overlaps(a))
		}
	}
}
