package network

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

// A network can't reach name servers on the host's loopback addresses or on a link of the host.
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
			if got, servers, err := resolvConf(spec.Names{}, nil); err != nil || got != c.want || servers != c.servers {
				t.Errorf("%q, %v, %v", got, servers, err)
			}
			got, servers, err := resolvConf(spec.Names{Servers: []string{"192.0.2.9"}, Search: []string{"."}, Options: []string{"ndots:1"}}, nil)
			if err != nil || got != "nameserver 192.0.2.9\noptions ndots:1\n" || !servers {
				t.Errorf("with flags: %q, %v, %v", got, servers, err)
			}
		})
	}
}

// A container may put anything in place of its hosts file. Names of others are not written elsewhere, and nothing
// waits.
func TestReplaceNamesInHostileFiles(t *testing.T) {
	dir := t.TempDir()
	const fine = "127.0.0.1\tlocalhost\n" + namesBegin + "192.0.2.7\told\n" + namesEnd + "# mine\n"
	for _, c := range []struct {
		what, text, want string
		make             func(file string) error
	}{
		{"longer", fine, "127.0.0.1\tlocalhost\n" + namesBegin + "192.0.2.8\tnew\n192.0.2.9\tnewer\n" + namesEnd + "# mine\n", nil},
		{"no lines", "mine\n", "mine\n", nil},
		{"no end", namesBegin + "mine\n", namesBegin + "mine\n", nil},
		{"the end first", namesEnd + namesBegin, namesEnd + namesBegin, nil},
		{"empty", "", "", nil},
		{"a link", "", fine, func(file string) error {
			return errors.Join(os.WriteFile(file+".victim", []byte(fine), 0o600), os.Remove(file), os.Symlink(file+".victim", file))
		}},
		{"a lease on it", fine, fine, func(file string) error {
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			t.Cleanup(func() { f.Close() })
			_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
			return err
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			file := filepath.Join(dir, strings.ReplaceAll(c.what, " ", "-"))
			err := os.WriteFile(file, []byte(c.text), 0o644)
			if err == nil && c.make != nil {
				err = c.make(file)
			}
			if err != nil {
				t.Fatal(err)
			}
			replaceNames(file, "192.0.2.8\tnew\n192.0.2.9\tnewer\n")
			if got, err := os.ReadFile(file); err != nil || string(got) != c.want {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	replaceNames(fifo, "192.0.2.8\tnew\n") // and does not wait
	huge := filepath.Join(dir, "huge")
	if err := errors.Join(os.WriteFile(huge, []byte(fine), 0o600), os.Truncate(huge, 1<<40)); err != nil {
		t.Fatal(err)
	}
	replaceNames(huge, "192.0.2.8\tnew\n")
}
