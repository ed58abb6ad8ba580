//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"distkit/testdata/fixture"
)

// TestPasta: an ordinary user's container reaches other hosts, the host, and what is published, by pasta; not the host's loopback interface unless
// that is asked for. pasta ends with the container, however that ends.
func TestPasta(t *testing.T) {
	fixture.Need(t, "pasta,newuidmap,userns,curl")
	p, outside := networked(t)
	answer := func(address, text string) error {
		l, err := net.Listen("tcp", address)
		if err == nil {
			t.Cleanup(func() { l.Close() })
			go func() {
				_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, text) }))
			}()
		}
		return err
	}
	outside(func() error { return answer("192.0.2.2:80", "another host") })
	if err := inNetwork("/proc/"+p.sh("cat host.pid")+"/ns/net", func() error {
		c, err := net.ListenPacket("udp", "127.0.0.53:53")
		if err == nil {
			t.Cleanup(func() { c.Close() })
			go dns(c, [4]byte{192, 0, 2, 2})
		}
		return errors.Join(err, answer("192.0.2.1:8081", "the host"), answer("127.0.0.1:8082", "loopback"))
	}); err != nil {
		t.Fatal(err)
	}
	// What udev does on most hosts, in the host's mount namespace.
	p.sh(`mknod tun c 10 200 && chmod 666 tun && mount --bind tun /dev/net/tun; echo nameserver 127.0.0.53 >stub; mount --bind stub /etc/resolv.conf
		` + p.mapped())
	p.sh(`chown -R 1000:1000 .`)
	p.Vars = append(p.Vars, "HOME="+p.dir, "XDG_RUNTIME_DIR="+p.dir)
	p.id()
	root := p.before
	p.before = strings.Replace(root, `-- "$0" "$@"`, `-- setpriv --reuid 1000 --regid 1000 --clear-groups -- "$0" "$@"`, 1)
	const traces = `find distkit -mindepth 2 | sort; ps -eo args | grep -F "$PWD" | grep -v grep || true`
	p.sh(`dist-run --rm --net pasta --rootfs rootfs true`)
	before := p.sh(traces)
	const get, soon = ` --rootfs rootfs wget -q -O- http://`, `; for _ in $(seq 600); do curl -s -o /dev/null http://127.0.0.1:8080/ && break; sleep 0.05; done; `
	for _, tt := range []struct{ name, script, want string }{
		{"another host", `dist-run --rm --net pasta` + get + `192.0.2.2/`, "another host"},
		{"by name, of a stub", `dist-run --rm --net pasta` + get + `mirror.example/`, "another host"},
		{"the host", `dist-run --rm --net pasta` + get + `192.0.2.1:8081/`, "the host"},
		{"not its loopback", `dist-run --rm --net pasta --rootfs rootfs sh -c 'for a in 10.87.0.1 127.0.0.1; do busybox timeout 1 wget -q -O- http://$a:8082/ 2>/dev/null || echo refused; done'`, "refused\nrefused"},
		{"its loopback", `dist-run --rm --net pasta:host-loopback` + get + `10.87.0.1:8082/; echo; dist-run --rm --net pasta:host-loopback --add-host up:host-gateway` + get + `up:8082/`, "loopback\nloopback"},
		{"published", `dist-run -d --rm --id $ID -p 127.0.0.1:8080:80` + strings.TrimSuffix(httpd, "; ") + soon + `curl -s http://127.0.0.1:8080/; curl -s http://192.0.2.1:8080/ || echo no
			task exec $ID cat /proc/net/dev | grep -c eth0; dist-run --rm -p 8080:1 --rootfs rootfs true 2>&1 | grep -o 'is taken' || true; task rm -f $ID || true`, "page\nno\n1\nis taken"},
		{"again", `dist-run -d --id $ID -p 8080:80` + strings.TrimSuffix(httpd, "; ") + soon + `curl -s http://192.0.2.1:8080/; task stop -t 0 $ID; pgrep -f "^pasta .*run.$ID/" || echo ended
			task start $ID >/dev/null` + soon + `curl -s http://192.0.2.1:8080/; task rm -f $ID || true`, "page\nended\npage"},
		{"its end", `dist-run --rm --id $ID --net pasta --rootfs rootfs sh -c 'exit 7' || echo $?`, "7"},
		// Killed, also with its guard: by itself, or by the next call.
		{"killed", `for s in 0.1 0.3 1; do dist-run --rm --id $ID --net pasta --rootfs rootfs sleep 1000 & sleep $s; kill -9 $! || true; wait $! || true
			for _ in $(seq 600); do pgrep -f "/run.$ID/netns" >/dev/null || run-net ls -q | grep -Fx "run.$ID" >/dev/null || break; sleep 0.05; done
			pgrep -f "/run.$ID/netns" || echo ended; done`, "ended\nended\nended"},
		{"killed with its guard", `dist-run --rm --id $ID -p 8080:80` + strings.TrimSuffix(httpd, "; ") + ` &` + soon[1:] + `curl -s http://127.0.0.1:8080/; for p in $(pgrep -f "^distkit-shim $ID\$") $!; do kill -9 $p; done; wait $! || true
			dist-run --rm --id $ID --rootfs rootfs true; pgrep -f "/run.$ID/netns" || echo ended`, "page\nended"},
		{"not installed", `mkdir few; for f in bash cat dirname env nsenter newuidmap newgidmap readlink runc; do ln -s "$(command -v $f)" few/; done; 
			for c in "task create --net pasta --rootfs rootfs $ID true" "dist-run --net pasta --rootfs rootfs true"; do PATH=${PATH%%:*}:$PWD/few $c 2>&1 || echo $?; done`,
			"task: network pasta: pasta is not installed (Debian: passt)\n10\ndist-run: network pasta: pasta is not installed (Debian: passt)\n125"},
		{"refused", `for f in --net=pasta:x --publish=80:80 --publish=8080:80/sctp "--net=pasta --add-host=a:host-gateway" --net=bridge; do dist-run --rm $f --rootfs rootfs true 2>/dev/null || echo -n "$? "; done`, "125 125 125 125 125 "},
	} {
		if got := p.sh(tt.script); got != tt.want {
			t.Errorf("%s: %q, not %q", tt.name, got, tt.want)
		}
		if after := p.sh(traces); after != before {
			t.Errorf("%s left:\n%s", tt.name, difference(before, after))
		}
	}
	p.before = root
	p.fails(125, "dist-run", `dist-run --rm --net pasta --rootfs rootfs true`)
}
