//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/testdata/fixture"
)

// left is what containers leave of themselves where they are not cleaned up: all of it is to be
// the same before and after.
const left = `findmnt -rn -o TARGET,FSTYPE | grep -F "$PWD" | sort || true
find .content/containers -mindepth 2 -maxdepth 2 2>/dev/null || true
snap ls | grep Active || true
find "$XDG_RUNTIME_DIR/distkit" -type f -o -type d 2>/dev/null | sed 's/.*\///' | sort || true
ls -d /sys/fs/cgroup/*/distkit*"$ID"* /sys/fs/cgroup/*/distkit/*"$ID"* /sys/fs/cgroup/distkit*"$ID"* 2>/dev/null || true
run-net ls -q 2>/dev/null | grep "run.$ID" || true
for _ in $(seq 100); do pgrep -f "^distkit-shim $ID" >/dev/null || break; sleep 0.05; done # a shim may end after its container is gone
ps -eo args | grep -F "$ID" | grep -v -e grep -e findmnt || true`

func (p *place) id() string {
	id := fmt.Sprintf("e%d-%d", os.Getpid(), time.Now().UnixNano()%1e9)
	p.Vars = append(p.Vars, "ID="+id)
	return id
}

// mapped makes a place of user 1000's, and returns what lets that be a user with subordinate IDs in a mount
// namespace of its own.
func (p *place) mapped() string {
	p.t.Helper()
	users, err := os.ReadFile("/etc/passwd")
	if err := errors.Join(err, os.WriteFile(filepath.Join(p.dir, "passwd"), append(users, "user:x:1000:1000::/:/bin/sh\n"...), 0o644),
		os.WriteFile(filepath.Join(p.dir, "subids"), []byte("1000:100000:65536\n"), 0o644),
		os.Chown(p.dir, 1000, 1000), os.Chmod(filepath.Dir(p.dir), 0o755)); err != nil {
		p.t.Fatal(err)
	}
	return "mount --bind subids /etc/subuid && mount --bind subids /etc/subgid && mount --bind passwd /etc/passwd"
}

// user makes a place of user 1000's, with subordinate IDs.
func (p *place) user() {
	p.t.Helper()
	fixture.Need(p.t, "newuidmap,userns")
	p.Vars = append(p.Vars, "HOME="+p.dir, "XDG_RUNTIME_DIR="+p.dir)
	p.before = p.mapped() + ` &&
		exec setpriv --reuid 1000 --regid 1000 --clear-groups -- "$0" "$@"; false`
}

func asBoth(t *testing.T, f func(t *testing.T, p *place)) {
	for _, who := range []string{"root", "user"} {
		t.Run(who, func(t *testing.T) {
			fixture.Need(t, "runc,overlay")
			p := here(t)
			p.t = t
			if who == "user" {
				p.user()
			}
			p.id()
			f(t, p)
		})
	}
}

// TestDistRunEnds: on every way out of dist-run nothing stays of a container.
func TestDistRunEnds(t *testing.T) {
	asBoth(t, func(t *testing.T, p *place) {
		// The image is pulled where it is missing, and used where it isn't.
		if got := p.sh(`dist-run --rm --pull missing ` + single + ` id -u 2>/dev/null`); got == "" {
			t.Error("no user")
		}
		before := p.sh(left)
		const detached = `dist-run --detach --rm --id $ID ` + single + ` sleep 1000`
		for _, tt := range []struct{ name, script, want string }{
			{"exit", `dist-run --rm --id $ID ` + single + ` true; echo $?`, "0"},
			{"status", `dist-run --rm --id $ID ` + single + ` sh -c 'exit 37' || echo $?`, "37"},
			{"no such command", `dist-run --rm --id $ID ` + single + ` /none 2>&1 || echo $?`, "127"},
			{"entrypoint", `dist-run --rm --id $ID --entrypoint sh ` + single + ` -c 'echo $0 "$@"' a 'b c' "d'e"`, `a b c d'e`},
			{"no such user", `dist-run --rm --id $ID --user none ` + single + ` true 2>&1 || echo $?`, "125"},
			{"no such mount source", `dist-run --rm --id $ID -v /none:/x ` + single + ` true 2>&1 || echo $?`, "125"},
			{"wrong flag", `dist-run --rm --id $ID --memory much ` + single + ` true 2>&1 || echo $?`, "125"},
			{"no image", `dist-run --rm --id $ID --pull never docker.io/library/none true 2>&1 || echo $?`, "125"},
			{"signal", `dist-run --rm --id $ID ` + single + ` sh -c 'trap "exit 9" TERM; echo up; while :; do sleep 0.1; done' >log & pid=$!
				until grep -q up log; do sleep 0.05; done; kill $pid; wait $pid || echo $?`, "9"},
			{"detached", detached + ` >/dev/null; task ls | cut -f3; task rm -f $ID || echo $?`, "running"},
			// Killed at any moment, by itself or with its process group, it leaves no process behind.
			{"killed", `gone() { for _ in $(seq 600); do pgrep -f '^sleep 400[78]' >/dev/null || return 0; sleep 0.05; done; echo orphans; }
				for s in 0.02 0.1 0.2 0.3 0.4 0.5 0.7 1; do dist-run --rm --id $ID ` + single + ` sh -c 'sleep 4007 & exec sleep 4008' & pid=$!; sleep $s; kill -9 $pid || true; wait $pid || true; gone; done
				timeout -s KILL 1 dist-run --rm --id $ID ` + single + ` sh -c 'sleep 4007 & exec sleep 4008' || true; gone
				again=no; for _ in 1 2 3 4 5; do if dist-run --rm --id $ID ` + single + ` true; then again=yes; break; fi; sleep 1; done; echo $again`, "yes"},
			{"keep", `dist-run --id $ID ` + single + ` sh -c 'exit 4' || echo $?; task ls -a | cut -f3; task rm $ID || true`, "4\nstopped"},
			{"taken", detached + ` >/dev/null; dist-run --rm --id $ID ` + single + ` true 2>/dev/null || echo $?; task ls | cut -f3; task rm -f $ID || true`, "125\nrunning"},
			{"rootfs", `mkdir -p rootfs/bin && cp "$(command -v busybox)" rootfs/bin/sh && dist-run --rm --id $ID --rootfs rootfs /bin/sh -c 'echo here >/file' && cat rootfs/file`, "here"},
			{"not ours", `dist-userns -- snap prepare $ID >/dev/null; dist-run --rm --id $ID ` + single + ` true; dist-userns -- snap rm $ID && echo stayed`, "stayed"},
			// The steps that are printed are those that are taken.
			{"dry", `dist-run --rm --id $ID --dry-run -e 'A=x  $(y)' ` + single + ` sh -c 'echo "$A"; exit 5' >steps; test ! -e .content/containers; bash <steps || echo $?`, "x  $(y)\n5"},
			{"dry shell", `dist-run --rm --id $ID --dry-run ` + single + ` sh -c 'exit 6' | while read -r step; do echo "$step"; done | bash || echo $?`, "6"},
		} {
			t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
				q := *p
				q.t = t
				got := q.sh(tt.script)
				if lines := strings.Split(got, "\n"); tt.want != got && (strings.Contains(tt.want, "\n") || lines[len(lines)-1] != tt.want) {
					t.Errorf("it printed %q, not %q", got, tt.want)
				}
				if after := q.sh(left); after != before {
					t.Errorf("it left:\n%s", difference(before, after))
				}
			})
		}
	})
}

// TestDirectAsUser: run and task are an ordinary user's by themselves, as dist-run is.
func TestDirectAsUser(t *testing.T) {
	fixture.Need(t, "runc,overlay")
	p := here(t)
	p.t = t
	p.user()
	p.id()
	p.sh("dist-run --rm " + single + " true")
	p.sh(`mkdir -p b/rootfs/bin && cp "$(command -v busybox)" b/rootfs/bin/ && for a in sh id sleep true touch; do ln -s busybox b/rootfs/bin/$a; done`)
	before := p.sh(left)
	const config = `config() { echo '{"config":{}}' | run-spec -- "$@" >b/config.json; }; status() { local s=0; "$@" || s=$?; echo "$s"; }
		await() { for _ in $(seq 3000); do ! eval "$1" || return 0; sleep 0.02; done; echo "in vain: $1" >&2; exit 1; }; shim() { jq .monitor.pid ${DIST_STATE:-$XDG_RUNTIME_DIR/distkit}/run/$ID/state.json; }
		`
	for _, tt := range []struct{ name, script, want string }{
		{"run", `config sh -c 'id -u; exit 3'; status run b`, "0\n3"},
		{"detach", `config sh -c 'echo up; exec sleep 1000'; run -d --rm --id $ID b >/dev/null; await 'task logs $ID | grep -q up'
			task exec $ID id -u; task exec -d $ID sleep 999 >/dev/null; task ps $ID | wc -l
			[ "$(task ps -o uid,user $ID | head -n 1)" = "$(id -u)	$(id -un)" ] && echo own; task kill -s KILL $ID; await '! task info $ID 2>/dev/null >&2'`, "0\n2\nown"},
		{"terminal", `config sleep 1000; run -d --id $ID b >/dev/null; task exec -t $ID sh -c 'test -t 1 && echo yes' | tr -d '\r'; status task rm -f $ID`, "yes\n0"},
		{"shim killed", `config sh -c 'trap "echo told; exit 6" TERM; while :; do sleep 0.02; done'; run -d --id $ID b >/dev/null; s=$(shim); kill -9 $s
			await '! kill -0 $s 2>/dev/null'; task logs $ID; await '[ "$(shim)" != $s ]'; task kill $ID; status task wait $ID; task logs $ID; status task rm $ID`, "6\ntold\n6"},
		{"begun again", `config sh -c 'exit 4'; run -d --id $ID b >/dev/null; status task wait $ID; task start $ID >/dev/null; status task wait $ID; status task rm $ID`, "4\n4\n4"},
		{"many", `for n in 1 2; do dist-run -d --id $ID-$n ` + single + ` sh -c 'touch /tmp/x; exec sleep 1000' >/dev/null; done; task ls -q | task rm -f -; task ls -a; task rm -f $ID-1 $ID-2; status task rm $ID-1 $ID-2 2>/dev/null`, "125"},
		{"exec", `dist-run -d --id $ID ` + single + ` sleep 1000 >/dev/null; task exec $ID id -un; status task exec $ID none 2>/dev/null; status task rm -f $ID`, "redis\n127\n0"},
		{"its files", `dist-run --id $ID ` + single + ` touch /data/x; stat -c %u .content/snapshots/overlayfs/*/fs/data/x; status task rm $ID`, "100998\n0"},
		{"volume", `for n in 1 2; do dist-run --rm --id $ID --volume db:/data ` + single + ` sh -c 'echo line >>/data/file; cat /data/file /etc/hosts' | grep -c -e line -e localhost; done; task volumes --rm db; test ! -e .content/volumes && echo gone`, "3\n4\ngone"},
		{"joined", `pod() { status dist-run --rm --id $ID-2 --ipc container:$ID --net container:$ID ` + single + ` true 2>&1 | sed "s/$ID/ID/g"; }
			dist-run -d --id $ID ` + single + ` sleep 1000 >/dev/null; pod; task stop -t 0 $ID; pod; task rm $ID >/dev/null || true; pod`,
			"run: container ID-2: ipc namespace of container ID: it is in another user namespace, where only root of the host can join it\n125\n" +
				"run: container ID-2: ipc namespace of container ID: container ID is stopped\n125\n" +
				"dist-run: ipc namespace of container ID: no container ID\n125"},
		{"files of others", `mkdir w; dist-userns -- bash -ec 'snap prepare --mount w $ID; mkdir -p w/d/e; chown -R 5:5 w/d; chmod 700 w/d; snap umount w' >/dev/null; rmdir w
			for verb in usage rm; do status snap $verb $ID 2>err; grep -o -e 'dist-userns -- rm -rf' err; done; dist-userns -- dist-gc --grace 0 >/dev/null; ls -A .content/snapshots/overlayfs/tmp`, "9\ndist-userns -- rm -rf\n9\ndist-userns -- rm -rf"},
		// A user namespace of its own takes no subordinate IDs.
		{"own namespace", `(cd b && rm -f config.json && runc spec --rootless && jq '.process.terminal=false | .process.args=["sh","-c","id -u; exec sleep 1000"]' config.json >c && mv c config.json)
			mkdir bin; for f in dist-userns newuidmap; do printf '#!/bin/sh\nexit 1' >bin/$f; chmod +x bin/$f; done; PATH=$PWD/bin:$PATH; run -d --id $ID b >/dev/null; await 'task logs $ID | grep -q 0'
			task exec $ID id -u; s=$(shim); kill -9 $s; await '! kill -0 $s 2>/dev/null'; task exec $ID id -u; status task rm -f $ID; rm -r bin`, "0\n0\n0"},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
			q := *p
			q.t = t
			if got := q.sh(config + tt.script); got != tt.want {
				t.Errorf("it printed %q", got)
			}
			q.sh(`task rm -f $ID >/dev/null || true`)
			if after := q.sh(left); after != before {
				t.Errorf("it left:\n%s", difference(before, after))
			}
		})
	}
}

// TestDistRunNet reaches redis from the host and from another container, by a port and a bridge.
func TestDistRunNet(t *testing.T) {
	fixture.Need(t, "runc,overlay,cni")
	p := here(t)
	p.t = t
	id := p.id()
	p.sh("dist-run --rm " + single + " true")
	before := p.sh(left)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	p.sh(fmt.Sprintf(`dist-run --detach --rm --id $ID --net bridge -p %d:6379 %s redis-server --save '' --bind 0.0.0.0 --protected-mode no`, port, single))
	defer p.sh("task rm -f $ID >/dev/null 2>&1 || true")
	address := p.sh(`run-net ls --json | jq -r 'select(.id == "run.'$ID'").addresses[0]' | cut -d/ -f1`)
	if got := p.sh(fmt.Sprintf(`for i in $(seq 1200); do exec 3<>/dev/tcp/127.0.0.1/%d && break; sleep 0.05; done 2>/dev/null; printf 'PING\r\n' >&3; read -t 5 -r answer <&3; echo "$answer"`, port)); got != "+PONG\r" {
		t.Errorf("by the port redis says %q", got)
	}
	if got := p.sh("dist-run --rm --net bridge " + single + " redis-cli -h " + address + " ping"); got != "PONG" {
		t.Errorf("by the bridge redis says %q", got)
	}
	if got := p.sh(`task exec $ID sh -c 'cat /etc/resolv.conf' | cmp - /etc/resolv.conf && echo same`); got != "same" {
		t.Errorf("resolv.conf: %q", got)
	}
	p.sh("task kill $ID; task wait $ID || true; while task info $ID >/dev/null 2>&1; do sleep 0.05; done")
	if after := p.sh(left); after != before {
		t.Errorf("it left:\n%s", difference(before, after))
	}
	// A container that stays has its network while it runs.
	reached := fmt.Sprintf(`for i in $(seq 1200); do (exec 3<>/dev/tcp/127.0.0.1/%d && printf 'PING\r\n' >&3 && read -t 1 -r answer <&3 && [[ $answer == +PONG* ]]) && echo reached && break; sleep 0.05; done 2>/dev/null || true`, port)
	unconnected := `for i in $(seq 1200); do [ "$(task ls -a | cut -f3)" != stopped ] || break; sleep 0.05; done; task ls -a | grep -v stopped || true; flock .content/containers/default/$ID/lock true; run-net ls -q | grep "run.$ID" || true; findmnt -rn -o TARGET | grep "run.$ID" || true; iptables -t nat -S | grep ` + fmt.Sprintf("'[: ]%d '", port) + ` || true`
	p.sh(fmt.Sprintf(`dist-run --detach --id $ID --net bridge -p %d:6379 %s redis-server --save '' --bind 0.0.0.0 --protected-mode no`, port, single))
	for _, end := range []string{"task kill $ID", "kill -9 $(jq .monitor.pid ${DIST_STATE:-/run/distkit}/run/$ID/state.json); kill -9 $(task info $ID | jq .pid); sleep 0.1; dist-run --rm " + single + " true", "task kill -s KILL $ID"} {
		if got := p.sh(reached); got != "reached" {
			t.Errorf("before %s redis is not reached", end)
		}
		if got := p.sh(end + "; " + unconnected); got != "" {
			t.Errorf("after %s there is a network: %s", end, got)
		}
		p.sh("task start $ID")
	}
	p.sh("task rm -f $ID || true")
	if after := p.sh(left); after != before {
		t.Errorf("what stayed left:\n%s", difference(before, after))
	}
	// What fails halfway takes its network away; so does what was killed.
	p.sh(`! dist-run --rm --id $ID -p 8080:80 --user none ` + single + ` true 2>/dev/null`)
	p.sh(`dist-run --rm --id $ID -p ` + fmt.Sprint(port) + `:80 ` + single + ` sleep 1000 & pid=$!; until run-net ls -q | grep -q "run.$ID"; do sleep 0.01; done; kill -9 $pid; wait $pid || true; sleep 0.3; task rm -f $ID >/dev/null 2>&1 || true; task ls -a >/dev/null; dist-run --rm --id $ID ` + single + ` true`)
	if after := p.sh(left); after != before {
		t.Errorf("%s killed left:\n%s", id, difference(before, after))
	}
}

// stopping stands for each primitive that dist-run calls: at the STOP_N-th call it sends STOP_SIGNAL
// to dist-run, before it is that primitive or after, or is killed instead. What goes on has a lock on alive.
const stopping = `#!/bin/bash
set -u
name=${0##*/}
exec 8>>calls 9>alive
flock -s 9
flock 8
echo "$name" >&8
n=$(wc -l <calls)
exec 8>&-
# The script itself is in a user namespace where its user is none: a child of any of dist-userns's threads.
stop() {
	until [[ -s pid ]]; do :; done
	pid=$(<pid)
	[[ $EUID != 0 || $ME == 0 ]] || read -r pid < <(cat /proc/$pid/task/*/children)
	kill -s "$STOP_SIGNAL" "$pid" || { touch missed; exit 1; }
}
if [[ $n == "$STOP_N" ]]; then
	case $STOP_AT in
	before) stop ;;
	after) "$BIN/$name" "$@"; s=$?; stop; exit "$s" ;;
	late) stop; until [[ -e go ]]; do sleep 0.01; done ;;
	instead) kill -KILL $$ ;;
	esac
fi
exec "$BIN/$name" "$@"
`

// TestDistRunKilled ends dist-run at each of its steps, by what can be caught and what can't: nothing that it
// leaves keeps the ID, or stays once the next call has been there.
func TestDistRunKilled(t *testing.T) {
	asBoth(t, func(t *testing.T, p *place) {
		me, flags := "0", "--rm"
		if p.before != "" {
			me = "1000"
		} else if fixture.Has("cni") {
			flags = "--rm --net bridge"
		}
		p.Vars = append(p.Vars, "BIN="+fixture.Bin, "ME="+me)
		p.sh(`mkdir w && cp "$BIN/dist-run" "$BIN/workflow.sh" w/ && for f in task snap run-net run-spec run dist-image dist-unpack dist-pull; do
			echo "$0" >w/$f && chmod +x w/$f; done`, stopping)
		p.sh("dist-run --rm " + single + " true")
		before := p.sh(left)
		// run starts dist-run, and returns its status and what was called, once all of it has ended.
		run := func(n int, at, signal, flags, then string) (status string, called []string) {
			t.Helper()
			words := strings.Fields(p.sh(fmt.Sprintf(`export STOP_N=%d STOP_AT=%s STOP_SIGNAL=%s; : >calls; : >pid; rm -f go
				{ s=0; w/dist-run %s --id $ID %s true >/dev/null 2>&1 & echo $! >pid; wait $! || s=$?; echo $s; } 2>/dev/null
				%s; touch go; flock alive true; test ! -e missed; cat calls`, n, at, signal, flags, single, then)))
			return words[0], words[1:]
		}
		_, steps := run(0, "never", "KILL", flags, ":")
		if len(steps) < 2 {
			t.Fatalf("steps %q", steps)
		}
		if after := p.sh(left); after != before {
			t.Fatalf("without a signal it left:\n%s", difference(before, after))
		}
		for n := range len(steps) {
			for k, how := range [][2]string{{"before", "KILL"}, {"after", "KILL"}, {"before", "TERM"}, {"after", "TERM"}, {"instead", "KILL"}} {
				for _, flags := range []string{flags, strings.TrimPrefix(flags, "--rm")} {
					at, signal := how[0], how[1]
					what := fmt.Sprintf("%s %s %s %d of %q", signal, at, flags, n+1, steps)
					status, _ := run(n+1, at, signal, flags, ":")
					caught := signal == "TERM" && me == "0" || at == "instead" && (status != "0" || strings.Contains(flags, "--rm"))
					switch remove := `task rm -f $ID || true; `; {
					case caught && steps[n] != "run": // it cleaned up itself
					case strings.Contains(flags, "--rm") && (n+k)%2 == 0:
						remove = "dist-run --rm --id $ID " + single + " true"
						fallthrough
					default:
						p.sh(remove)
					}
					if after := p.sh(left); after != before {
						t.Errorf("%s left:\n%s", what, difference(before, after))
					}
				}
			}
			// The primitive that it had begun goes on after what it works on was removed.
			run(n+1, "late", "KILL", flags, `task rm -f $ID >&2 || true`)
			p.sh("dist-run " + flags + " --id $ID " + single + " true")
			if after := p.sh(left); after != before {
				t.Errorf("%s, late, of %q left:\n%s", steps[n], steps, difference(before, after))
			}
		}
	})
}
