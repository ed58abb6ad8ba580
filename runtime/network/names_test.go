package network

import (
	"os"
	"path/filepath"
	"testing"

	"distkit/runtime/spec"
)

// A server on the host's loopback address is out of a network's reach, and so is one on a link of the host's.
func TestResolvConf(t *testing.T) {
	host, upstream := hostResolvConf, upstreamResolvConf
	defer func() { hostResolvConf, upstreamResolvConf = host, upstream }()
	for _, c := range []struct {
		what, host, upstream string
		want                 string
		servers              bool
	}{
		{"none there", "", "", "", false},
		{"plain", "nameserver 192.0.2.1\n", "nameserver 192.0.2.2\n", "nameserver 192.0.2.1\n", true},
		{"none", "search a.example\n", "", "search a.example\n", false},
		{"stub and upstream", "nameserver 127.0.0.53\nsearch a.example\n", "nameserver 192.0.2.1\nsearch b.example\n", "nameserver 192.0.2.1\nsearch b.example\n", true},
		{"stub alone", "nameserver 127.0.0.53\noptions edns0\n", "", "options edns0\n", false},
		{"empty upstream", "nameserver 127.0.0.53\nsearch a.example\n", "\n", "search a.example\n", false},
		{"stub behind a stub", "nameserver 127.0.0.53\n", "nameserver 127.0.0.1\n", "", false},
		{"dnsmasq and another", "nameserver 127.0.1.1\nnameserver 192.0.2.7\n", "nameserver 192.0.2.1\n", "nameserver 192.0.2.7\n", true},
		{"IPv6", "nameserver ::1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1", "", "nameserver 2001:db8::1\n", true},
		{"mapped, tabs, no newline", "nameserver 192.0.2.7\nnameserver\t::ffff:127.0.0.1", "", "nameserver 192.0.2.7\n", true},
	} {
		t.Run(c.what, func(t *testing.T) {
			dir := t.TempDir()
			hostResolvConf, upstreamResolvConf = filepath.Join(dir, "host"), filepath.Join(dir, "upstream")
			for name, text := range map[string]string{hostResolvConf: c.host, upstreamResolvConf: c.upstream} {
				if text == "" {
					continue
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if got, servers, err := ResolvConf(spec.Names{}); err != nil || got != c.want || servers != c.servers {
				t.Errorf("%q, %v, %v", got, servers, err)
			}
			got, servers, err := ResolvConf(spec.Names{Servers: []string{"192.0.2.9"}, Search: []string{"."}, Options: []string{"ndots:1"}})
			if err != nil || got != "nameserver 192.0.2.9\noptions ndots:1\n" || !servers {
				t.Errorf("with flags: %q, %v, %v", got, servers, err)
			}
		})
	}
}
