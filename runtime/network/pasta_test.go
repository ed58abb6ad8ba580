package network

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestParsePasta(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]struct{ is, fails, loopback bool }{
		"pasta": {is: true}, "pasta:host-loopback": {is: true, loopback: true}, "bridge": {}, "pasta2": {}, "./pasta": {},
		"pasta:": {is: true, fails: true}, "pasta:--map-gw": {is: true, fails: true}, "pasta:host-loopback,x": {is: true, fails: true},
	} {
		p, is, err := parsePasta(name)
		if is != want.is || errdefs.IsInvalidArgument(err) != want.fails || p != nil && p.HostLoopback != want.loopback {
			t.Errorf("%s: %+v %v %v", name, p, is, err)
		}
	}
}

// The name server of a network of pasta is the host's, through pasta where that is on a loopback address.
func TestResolvConfOfPasta(t *testing.T) {
	dir := t.TempDir()
	defer func(h, u string) { hostResolvConf, upstreamResolvConf = h, u }(hostResolvConf, upstreamResolvConf)
	hostResolvConf, upstreamResolvConf = filepath.Join(dir, "host"), filepath.Join(dir, "none")
	for _, c := range []struct {
		host, want string
		names      spec.Names
		servers    bool
	}{
		{"nameserver 127.0.0.53\nsearch a\n", "search a\nnameserver 10.87.0.3\n", spec.Names{}, true},
		{"nameserver 127.0.0.53\nnameserver 192.0.2.1\n", "nameserver 192.0.2.1\n", spec.Names{}, true},
		{"nameserver ::1\n", "nameserver 192.0.2.9\n", spec.Names{Servers: []string{"192.0.2.9"}}, true},
		{"search a\n", "search a\n", spec.Names{}, false},
	} {
		if err := os.WriteFile(hostResolvConf, []byte(c.host), 0o600); err != nil {
			t.Fatal(err)
		}
		got, servers, err := resolvConf(c.names, &pasta{})
		if got != c.want || servers != c.servers || err != nil {
			t.Errorf("%q: %q %v %v", c.host, got, servers, err)
		}
	}
}

// The number that pasta has written may be another process's by now, or no number.
func TestKillPasta(t *testing.T) {
	t.Parallel()
	p := place{dir: t.TempDir()}
	start := func(args ...string) *exec.Cmd {
		c := exec.Command("sh", append([]string{"-c", "read line"}, args...)...)
		in, err := c.StdinPipe()
		if err == nil {
			err = c.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = in.Close(); _ = c.Process.Kill(); _ = c.Wait() })
		return c
	}
	kill := func(text string) {
		t.Helper()
		if err := os.WriteFile(p.file(pastaPid), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := killPasta(p); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
	other := start("--netns", "/elsewhere/netns")
	for _, text := range []string{"", "x", "0", "1", "-1", strings.Repeat("9", 30), strconv.Itoa(other.Process.Pid) + "\n"} {
		kill(text)
	}
	if err := other.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("another process: %v", err)
	}
	mine := start("--netns", p.file("netns"))
	kill(strconv.Itoa(mine.Process.Pid) + "\n")
	if err := mine.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("pasta ended: %v", err)
	}
	kill(strconv.Itoa(mine.Process.Pid) + "\n")
	_ = os.Remove(p.file(pastaPid))
	if err := killPasta(p); err != nil {
		t.Error(err)
	}
}

// What can't be had is refused before anything is made.
func TestFindPasta(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for _, c := range []struct {
		connection runtime.Connection
		class      func(error) bool
	}{
		{runtime.Connection{Name: "pasta:all"}, errdefs.IsInvalidArgument},
		{runtime.Connection{Name: "pasta", Ports: []string{"8080:80/sctp"}}, errdefs.IsNotImplemented},
		{runtime.Connection{Name: "pasta"}, errdefs.IsNotImplemented}, // for root, or not installed
	} {
		if _, err := Find(c.connection); !c.class(err) {
			t.Errorf("%+v: %v", c.connection, err)
		}
	}
}
