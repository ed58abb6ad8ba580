//go:build e2e

package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"distkit/testdata/fixture"

	"golang.org/x/sys/unix"
)

// networked makes a place whose commands are on a host of their own: with a network, a /run and iptables that no other test has. The
// host's address is 192.0.2.1. Another host, 192.0.2.2, is its way to the world: outside calls a function there.
func networked(t *testing.T) (p *place, outside func(func() error)) {
	t.Helper()
	fixture.Need(t, "runc,cni,busybox")
	p = before(t, http.NotFoundHandler())
	p.t = t
	p.sh(`mkdir -p rootfs/bin rootfs/www && cp "$(command -v busybox)" rootfs/bin/ && for a in sh cat dd grep hostname httpd ls sleep true wget; do ln -s busybox rootfs/bin/$a; done
		echo page > rootfs/www/index.html`)
	p.boot()
	return p, func(f func() error) {
		t.Helper()
		if err := inNetwork(filepath.Join("/proc", p.sh("cat outside.pid"), "ns/net"), f); err != nil {
			t.Fatal(err)
		}
	}
}

// boot starts the place's host, again if there is one: its network and its /run are gone then, but its files are not.
func (p *place) boot() {
	p.t.Helper()
	host := exec.Command("unshare", "--net", "--mount", "sh", "-c", `echo $$ > host.pid; mount -t tmpfs tmpfs /run && mkdir /run/lock && ip link set lo up && {
		unshare --net sleep 1000 & echo $! > outside.pid
		until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
		ip link add up0 type veth peer name up1 netns $! && ip addr add 192.0.2.1/24 dev up0 && ip link set up0 up && ip route add default via 192.0.2.2 &&
		nsenter --net=/proc/$!/ns/net sh -c 'ip link set lo up && ip addr add 192.0.2.2/24 dev up1 && ip link set up1 up' && touch booted; wait; }`)
	host.Dir, host.SysProcAttr = p.dir, &syscall.SysProcAttr{Setpgid: true}
	if err := host.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.shutdown = func() {
		_ = unix.Kill(-host.Process.Pid, unix.SIGKILL)
		_ = host.Wait()
		_ = os.Remove(filepath.Join(p.dir, "booted"))
	}
	p.t.Cleanup(func() { p.shutdown() })
	p.before = ""
	p.sh(`for i in $(seq 500); do [ ! -e booted ] || exit 0; sleep 0.02; done; exit 1`)
	p.before = fmt.Sprintf(`exec nsenter --target %d --net --mount --wd=. -- "$0" "$@"; false`, host.Process.Pid)
}

// inNetwork calls a function in a network namespace: sockets that it opens stay there.
func inNetwork(path string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the function
		ns, err := os.Open(path)
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// dns answers each question for an IPv4 address with one, and every other one with nothing.
func dns(c net.PacketConn, address [4]byte) {
	b := make([]byte, 512)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		end := 12
		for end < n && b[end] != 0 {
			end += int(b[end]) + 1
		}
		end += 5
		if n < 12 || end > n {
			continue
		}
		answer := append([]byte(nil), b[:end]...)
		copy(answer[2:12], []byte{0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0})
		if binary.BigEndian.Uint16(b[end-4:]) == 1 {
			answer[7] = 1
			answer = append(append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4), address[:]...)
		}
		_, _ = c.WriteTo(answer, from)
	}
}

// traces prints what networks may leave on a host.
const traces = `ip -br link | sed 's/[@ ].*//'; for v in iptables ip6tables; do for t in filter nat; do $v -t $t -S; done; done; run-net ls
	find /run/distkit/networks -mindepth 1 2>/dev/null || true; grep /run/distkit /proc/self/mountinfo || true; find /run/distkit/addresses -name '10.*' 2>/dev/null || true`

const httpd = ` --rootfs rootfs httpd -f -p 80 -h /www >/dev/null; `

// TestNetworkOfAHost: with one flag a container fetches something by name, on a host that drops what it shall forward, and whose
// name server is a stub that no container reaches. Another host and other containers reach it, and nothing is left of it.
func TestNetworkOfAHost(t *testing.T) {
	p, outside := networked(t)
	outside(func() error {
		l, err := net.Listen("tcp", "192.0.2.2:80")
		c, cerr := net.ListenPacket("udp", "192.0.2.2:53")
		if err := errors.Join(err, cerr); err != nil {
			return err
		}
		t.Cleanup(func() { l.Close(); c.Close() })
		go dns(c, [4]byte{192, 0, 2, 2})
		go func() {
			_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s for %s", r.Host, r.RemoteAddr) }))
		}()
		return nil
	})
	p.sh(`iptables -P FORWARD DROP; ip6tables -P FORWARD DROP`)
	p.write("stub", "nameserver 127.0.0.53\noptions edns0\nsearch example\n")
	p.sh(`mkdir -p /run/systemd/resolve; printf 'nameserver 192.0.2.2\nsearch example\n' > /run/systemd/resolve/resolv.conf; mount --bind stub /etc/resolv.conf`)
	before := p.sh(traces)
	if got := p.sh(`dist-run --rm --net bridge --rootfs rootfs wget -q -O- http://mirror.example/`); !strings.HasPrefix(got, "mirror.example for 192.0.2.1:") {
		t.Errorf("a container fetched %q", got)
	}
	if after := p.sh(traces); after != before {
		t.Errorf("it left:\n%s", difference(before, after))
	}
	p.sh(`dist-run -d --rm --id web --net bridge -p 8080:80` + httpd + `dist-run -d --rm --id db --hostname database --net bridge` + httpd)
	var got string
	outside(func() error {
		c, err := net.Dial("tcp", "192.0.2.1:8080")
		if err == nil {
			_, err = c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			b := make([]byte, 1<<10)
			n, _ := c.Read(b)
			got = string(b[:n])
			c.Close()
		}
		return err
	})
	if !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("another host got %q", got)
	}
	for _, tt := range []struct{ name, script, want string }{
		{"the host", `for a in 127.0.0.1 192.0.2.1; do curl -s $a:8080; done`, "page\npage"},
		{"by name", `task exec web wget -q -O- http://database/; task exec db wget -q -O- http://web/`, "page\npage"},
		{"by itself", `task exec web wget -q -O- http://web/; task exec web wget -q -O- http://localhost/; task exec web cat /etc/hostname`, "page\npage\nweb"},
		{"by the host's port", `task exec db wget -q -O- http://192.0.2.1:8080/; task exec web wget -q -O- http://192.0.2.1:8080/`, "page\npage"},
		{"resolv.conf", `task exec web cat /etc/resolv.conf`, "nameserver 192.0.2.2\nsearch example"},
		// What a container writes stays, and names go on coming and going.
		{"written", `task exec web sh -c 'echo 192.0.2.7 mine >> /etc/hosts'; task rm -f db || true; task exec web grep -c -e database -e mine /etc/hosts`, "1"},
		// One that took the lines away, or has filled the file, keeps it as it is, and is in nobody's way.
		{"taken over", `task exec web sh -c 'echo mine > /etc/hosts'; dist-run --rm --net bridge --rootfs rootfs true; task exec web cat /etc/hosts`, "mine"},
		{"filled", `task exec web dd if=/dev/zero of=/etc/hosts bs=1M count=8 2>/dev/null || echo full; dist-run --rm --net bridge --rootfs rootfs wget -q -O- http://web/
			find /run -size +300k`, "full\npage"},
		{"flags", `dist-run --rm --net bridge --dns 192.0.2.2 --dns-search . --dns-option ndots:2 --add-host gate:host-gateway --add-host six:2001:db8::6 --rootfs rootfs sh -c 'cat /etc/resolv.conf; grep -e gate -e six /etc/hosts'`,
			"nameserver 192.0.2.2\noptions ndots:2\n10.86.0.1\tgate\n2001:db8::6\tsix"},
		{"read-only", `dist-run --rm --net bridge --read-only --rootfs rootfs sh -c 'echo x >> /etc/hosts' 2>/dev/null || echo refused`, "refused"},
		{"a mount of one's own", `echo mine > mine; dist-run --rm --net bridge -v "$PWD/mine:/etc/hosts" --rootfs rootfs cat /etc/hosts`, "mine"},
		{"wrong flags", `for f in --dns=name --add-host=x --add-host=x:y --dns-option='a b' --hostname='a b'; do for n in none bridge; do dist-run --rm --net $n $f --rootfs rootfs true 2>/dev/null || echo -n "$? "; done; done`,
			strings.TrimSpace(strings.Repeat("125 ", 10))},
	} {
		if got := strings.TrimSpace(p.sh(tt.script)); got != tt.want {
			t.Errorf("%s: %q, not %q", tt.name, got, tt.want)
		}
	}
	p.sh(`task rm -f web || true`)
	if after := p.sh(traces); after != before {
		t.Errorf("they left:\n%s", difference(before, after))
	}
}

// TestNetworkNone: a container without a network, and one in the host's, have names, too. An image can't lead the files elsewhere.
func TestNetworkNone(t *testing.T) {
	p, _ := networked(t)
	p.sh(`echo host > victim; chmod 600 victim; mkdir led; cp -r rootfs/bin led/; mkdir led/etc led/elsewhere
		ln -s ../../../../../../../..$PWD/victim led/etc/hosts; ln -s /elsewhere/name led/etc/hostname; ln -s "$PWD/victim" led/etc/resolv.conf`)
	for _, tt := range []struct{ name, script, want string }{
		{"none", `dist-run --rm --id me --rootfs rootfs sh -c 'cat /etc/hostname; hostname; grep -e localhost$ -e me /etc/hosts; ls /etc'`,
			"me\nme\n127.0.0.1\tlocalhost\n127.0.1.1\tme\nhostname\nhosts"},
		{"flags", `dist-run --rm --hostname you --add-host a:192.0.2.7 --dns 192.0.2.2 --dns-search . --rootfs rootfs sh -c 'cat /etc/hostname; grep -e you -e a$ /etc/hosts; grep nameserver /etc/resolv.conf'`,
			"you\n127.0.1.1\tyou\n192.0.2.7\ta\nnameserver 192.0.2.2"},
		{"no gateway", `dist-run --rm --add-host a:host-gateway --rootfs rootfs true 2>&1 | grep -c gateway || true`, "1"},
		{"host", `dist-run --rm --net host --rootfs rootfs cat /etc/hosts | cmp - /etc/hosts && echo same
			dist-run --rm --net host --add-host a:192.0.2.7 --rootfs rootfs cat /etc/hosts | diff /etc/hosts - | tail -1 || true`, "same\n> 192.0.2.7\ta"},
		{"started again", `dist-run --id again --rootfs rootfs sh -c 'echo 192.0.2.7 mine >> /etc/hosts'; task start again >/dev/null; task wait again >/dev/null; grep -c mine .content/containers/default/again/hosts; task rm again`, "2"},
		{"other users", `umask 077; dist-run --rm --user 1000 --rootfs rootfs cat /etc/hostname | wc -l`, "1"},
		{"led elsewhere", `dist-run --rm --id me --net bridge --rootfs led sh -c 'cat /etc/hostname; echo x >> /etc/hosts; echo x >> /etc/resolv.conf' || true; dist-run --rm --id me --rootfs led sh -c 'echo x >> /etc/hosts' || true; cat victim; stat -c %a victim`, "me\nhost\n600"},
		{"two in one network", `path=$(run-net add -q --add-host a:192.0.2.7 pod); dist-run -d --rm --id web --net "$path"` + httpd + `
			dist-run --rm --net "$path" --rootfs rootfs sh -c 'wget -q -O- http://pod/; grep -c a$ /etc/hosts'; task rm -f web || true; run-net del pod`, "page\n1"},
	} {
		if got := p.sh(tt.script); got != tt.want {
			t.Errorf("%s: %q, not %q", tt.name, got, tt.want)
		}
	}
}

// TestNetworkPorts: a port leads to one container, and to none if the host uses it.
func TestNetworkPorts(t *testing.T) {
	p, _ := networked(t)
	before := p.sh(traces)
	var l net.Listener
	err := inNetwork(filepath.Join("/proc", p.sh("cat host.pid"), "ns/net"), func() (err error) {
		l, err = net.Listen("tcp", "127.0.0.1:8080")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p.fails(5, "run-net", `run-net add -p 8080:80 a`)
	p.fails(5, "run-net", `run-net add -p 127.0.0.1:8080:80 a`)
	p.sh(`run-net add -p 8080:80/udp -p 192.0.2.1:8080:80 a; run-net del a`)
	l.Close()
	p.sh(`run-net add -p 8080:80 a`)
	for _, taken := range []string{"8080:81", "127.0.0.1:8080:80", "0.0.0.0:8080:80"} {
		p.fails(5, "run-net", `run-net add -p `+taken+` b`)
	}
	p.fails(5, "run-net", `run-net --namespace other add -p 8080:80 b`)
	p.fails(2, "run-net", `run-net add -p 90:1 -p 127.0.0.1:90:2 b`)
	p.sh(`run-net down a; run-net add -p 8080:80 b`)
	p.fails(5, "run-net", `run-net up a`)
	p.sh(`run-net del b; run-net up a; run-net del a`)
	if got := p.sh(`for i in 1 2 3 4; do (s=0; run-net add -p 8080:80 n$i >/dev/null 2>&1 || s=$?; echo $s) & done | sort | uniq -c | sed 's/^ *//'; wait; run-net ls | wc -l; run-net ls -q | run-net del -`); got != "1 0\n3 5\n1" {
		t.Errorf("four at once: %q", got)
	}
	if after := p.sh(traces); after != before {
		t.Errorf("left:\n%s", difference(before, after))
	}
}

// TestNetworkIPv6: on a host that forwards IPv6 and drops what it shall forward, containers reach each other, the world and their own
// ports by IPv6, and the world reaches these.
func TestNetworkIPv6(t *testing.T) {
	p, outside := networked(t)
	p.sh(`ip addr add 2001:db8::1/64 dev up0 nodad; ip -6 route add default via 2001:db8::2; nsenter --net=/proc/$(cat outside.pid)/ns/net ip addr add 2001:db8::2/64 dev up1 nodad
		echo 1 > /proc/sys/net/ipv6/conf/all/forwarding; iptables -P FORWARD DROP; ip6tables -P FORWARD DROP`)
	before := p.sh(traces)
	outside(func() error {
		l, err := net.Listen("tcp", "[2001:db8::2]:80")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "for %s", r.RemoteAddr) }))
		}()
		return nil
	})
	if got := p.sh(`dist-run --rm --net bridge --rootfs rootfs wget -q -O- 'http://[2001:db8::2]/'`); !strings.HasPrefix(got, "for [2001:db8::1]:") {
		t.Errorf("a container fetched %q", got)
	}
	p.sh(`dist-run -d --rm --id web --net bridge -p 8080:80 -p '[2001:db8::1]:8081:80'` + httpd + `dist-run -d --rm --id db --net bridge` + httpd)
	outside(func() error {
		for _, port := range []string{"8080", "8081"} {
			c, err := net.Dial("tcp", "[2001:db8::1]:"+port)
			if err != nil {
				return err
			}
			_, err = c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			b := make([]byte, 1<<10)
			n, _ := c.Read(b)
			c.Close()
			if !strings.HasPrefix(string(b[:n]), "HTTP/1.1 200 OK\r\n") {
				t.Errorf("another host got %q of port %s: %v", b[:n], port, err)
			}
		}
		return nil
	})
	for _, tt := range []struct{ name, script, want string }{
		{"addresses", `task exec db grep -c ^fd646973746b6974 /proc/net/if_inet6`, "1"},
		{"each other", `task exec db wget -q -O- "http://[$(task exec web grep ^fd64 /proc/net/if_inet6 | sed -E 's/^(.{4})(.{4})(.{4})(.{4})(.{4})(.{4})(.{4})(.{4}).*/\1:\2:\3:\4:\5:\6:\7:\8/')]/"`, "page"},
		{"the host", `curl -s 'http://[2001:db8::1]:8081/'`, "page"},
	} {
		if got := strings.TrimSpace(p.sh(tt.script)); got != tt.want {
			t.Errorf("%s: %q, not %q", tt.name, got, tt.want)
		}
	}
	p.sh(`task rm -f web db || true`)
	if after := p.sh(traces); after != before {
		t.Errorf("they left:\n%s", difference(before, after))
	}
}

// TestNetworkAfterABoot: a container that had a network gets one, of a configuration whose plugin keeps its leases over a boot. Leases
// of networks that are gone are given back; other programs' stay.
func TestNetworkAfterABoot(t *testing.T) {
	p, _ := networked(t)
	p.write("small.conflist", `{"cniVersion":"1.0.0","name":"small","plugins":[{"type":"bridge","bridge":"small0","isGateway":true,
		"ipam":{"type":"host-local","dataDir":"`+p.dir+`/leases","ranges":[[{"subnet":"10.87.0.0/29"}]]}}]}`)
	start := `dist-run -d --id web --net ./small.conflist` + httpd
	p.sh(start)
	p.sh(`dist-run -d --rm --id other --net bridge -p 8080:80 --add-host a:192.0.2.7` + httpd + `dist-run -d --id kept --net bridge -p 8081:80 --add-host a:192.0.2.7` + httpd)
	p.sh(`kill -9 $(jq .monitor.pid /run/distkit/run/*/state.json) $(task ls | cut -f2); for i in 3 4 5; do printf 'default--run.gone%s\r\neth0' $i > leases/small/10.87.0.$i; touch -d 2001-01-01 leases/small/10.87.0.$i; done
		printf '%064d\r\neth0' 7 > leases/small/10.87.0.6; touch -d 2001-01-01 leases/small/10.87.0.6`)
	p.shutdown()
	p.boot()
	if got := p.sh(`task start web kept >/dev/null; for i in web kept; do task exec $i wget -q -O- http://$i/; done; ls leases/small | grep -c '^10'; cat leases/small/10.87.0.6 | cut -c60-64 | head -1 | tr -d '\r'
		curl -s 127.0.0.1:8081; task exec kept grep -c a$ /etc/hosts`); got != "page\npage\n2\n00007\npage\n1" {
		t.Errorf("after a boot: %q", got)
	}
	p.sh(`task rm -f web kept || true`)
	if got := p.sh(`task ls -a; ls leases/small | grep '^10'`); got != "10.87.0.6" {
		t.Errorf("left: %q", got)
	}
}

// TestNetworkKilled kills run-net before and after each plugin, and while it removes what the last network leaves: the next
// command takes it away, and gets the port.
func TestNetworkKilled(t *testing.T) {
	p, _ := networked(t)
	p.write("plugin", `#!/bin/sh
n=$(($(cat count) + 1))
echo $n > count
[ $n != "$KILL_BEFORE" ] || { kill -9 $PPID; exit 1; }
"$REAL/${0##*/}" "$@"
s=$?
[ $n != "$KILL_AFTER" ] || kill -9 $PPID
exit $s
`)
	p.sh(`chmod +x plugin; mkdir plugins killing; for d in /usr/lib/cni /opt/cni/bin; do [ ! -e $d/bridge ] || real=$d; done; echo $real > real
		ln -s $real/host-local plugins/; for i in bridge portmap firewall; do cp plugin plugins/$i; done; cp plugin killing/iptables-save; cp plugin killing/iptables-restore`)
	before := p.sh(traces)
	killed := 0
	for _, verb := range []string{"add -p 8080:80", "del"} {
		for _, when := range []string{"BEFORE", "AFTER"} {
			for n := 1; n <= 5; n++ {
				script := `[ "$1" != del ] || CNI_PATH=$PWD/plugins run-net add -p 8080:80 x >/dev/null; echo 0 > count
					s=0; env REAL=$(cat real) KILL_$0=$2 CNI_PATH=$PWD/plugins run-net $1 x >/dev/null 2>&1 || s=$?; echo $s`
				if n > 3 { // the plugins were three
					if verb != "del" {
						continue
					}
					script = `run-net add -p 8080:80 x >/dev/null; echo 3 > count
						s=0; env REAL=$(dirname "$(command -v iptables-save)") KILL_$0=$2 PATH=$PWD/killing:$PATH run-net del x >/dev/null 2>&1 || s=$?; echo $s`
				}
				script = strings.Replace(script, "CNI_PATH=$PWD/plugins run-net add", "REAL=$(cat real) run-net add", 1)
				if got := p.sh(script, when, verb, fmt.Sprint(n)); got == "137" {
					killed++
				} else {
					t.Errorf("%s, %s %d: status %s", verb, when, n, got)
				}
				// Which one cleans up: the same again, a network that wants the port, and the removal.
				next := []string{`run-net add -p 8080:80 y >/dev/null; run-net del x y`, `run-net del x`, `run-net add -p 8080:80 x >/dev/null; run-net del x`}[n%3]
				if verb == "del" {
					next = `run-net del x`
				}
				p.sh(next)
				if after := p.sh(traces); after != before {
					t.Fatalf("%s killed %s %d left:\n%s", verb, when, n, difference(before, after))
				}
			}
		}
	}
	if killed != 16 {
		t.Errorf("%d were killed", killed)
	}
}
