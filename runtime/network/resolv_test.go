package network

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A server on the host's loopback address is out of a network's reach.
func TestResolvConf(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	for _, c := range []struct {
		what, host, upstream string
		path                 string // "" is the copy
		want                 string
		servers              bool
	}{
		{"plain", "nameserver 192.0.2.1\n", "nameserver 192.0.2.2\n", "host", "", true},
		{"none", "search a.example\n", "", "host", "", false},
		{"stub and upstream", "nameserver 127.0.0.53\nsearch a.example\n", "nameserver 192.0.2.1\nsearch a.example\n", "upstream", "", true},
		{"stub alone", "nameserver 127.0.0.53\noptions edns0\n", "", "", "options edns0\n", false},
		{"empty upstream", "nameserver 127.0.0.53\n", "\n", "", "", false},
		{"stub behind a stub", "nameserver 127.0.0.53\n", "nameserver 127.0.0.1\n", "", "", false},
		{"dnsmasq and another", "nameserver 127.0.1.1\nnameserver 192.0.2.7\n", "nameserver 192.0.2.1\n", "", "nameserver 192.0.2.7\n", true},
		{"IPv6", "nameserver ::1\nnameserver fe80::1%eth0\n", "", "", "nameserver fe80::1%eth0\n", true},
		{"mapped, tabs, no newline", "nameserver 192.0.2.7\nnameserver\t::ffff:127.0.0.1", "", "", "nameserver 192.0.2.7\n", true},
	} {
		t.Run(c.what, func(t *testing.T) {
			dir := t.TempDir()
			host, upstream := hostResolvConf, upstreamResolvConf
			defer func() { hostResolvConf, upstreamResolvConf = host, upstream }()
			hostResolvConf, upstreamResolvConf = filepath.Join(dir, "host"), filepath.Join(dir, "upstream")
			n, err := Open(filepath.Join(dir, "state"), "default", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, err := n.ResolvConf(); !errdefs.IsNotFound(err) {
				t.Errorf("without any: %v", err)
			}
			if err := os.WriteFile(hostResolvConf, []byte(c.host), 0o644); err != nil {
				t.Fatal(err)
			}
			if c.upstream != "" {
				if err := os.WriteFile(upstreamResolvConf, []byte(c.upstream), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			path, servers, err := n.ResolvConf()
			want := filepath.Join(dir, c.path)
			if c.path == "" {
				want = filepath.Join(dir, "state", "resolv.conf")
			}
			if err != nil || path != want || servers != c.servers {
				t.Fatalf("%s %v %v", path, servers, err)
			}
			if c.path != "" {
				return
			}
			b, err := os.ReadFile(path)
			info, serr := os.Stat(path)
			if err != nil || serr != nil || string(b) != c.want || info.Mode() != 0o644 {
				t.Errorf("%q %v %v", b, err, info)
			}
			if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
				t.Errorf("%q are left", left)
			}
		})
	}
}
