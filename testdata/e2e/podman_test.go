//go:build e2e

package e2e

import (
	"net/http"
	"testing"

	"distkit/testdata/fixture"
)

// TestPodmanFlags holds dist-run's flags to podman's of the same meaning: the container sees the same. What differs is in docs/coming-from.md.
func TestPodmanFlags(t *testing.T) {
	fixture.Need(t, "root,podman,runc,busybox")
	p := before(t, http.NotFoundHandler())
	p.t = t
	p.id()
	p.sh(`mkdir -p rootfs/bin rootfs/www rootfs/etc && cp "$(command -v busybox)" rootfs/bin/ && for a in cat cut tr echo grep head hostname id ls readlink sed sh sleep sort stat test true; do ln -s busybox rootfs/bin/$a; done
		printf 'root:x:0:0::/:/bin/sh\nweb:x:1000:50::/www:/bin/sh\n' >rootfs/etc/passwd; printf 'root:x:0:\nstaff:x:50:\nmore:x:60:\n' >rootfs/etc/group; echo secret >secret`)
	// Here may be less than podman's and docker's default limits, which would be refused.
	const podman = `unset REGISTRY_AUTH_FILE DOCKER_CONFIG; podman() { command podman --root "$PWD/p" --runroot "$PWD/r" --tmpdir "$PWD/t" --storage-driver vfs --cgroup-manager cgroupfs --runtime runc "$@"; }
		pr() { podman run --rm --network none --ulimit nofile=256:256 --ulimit nproc=1024:1024 "$@"; }; dr() { dist-run --rm --rlimit nofile=256:256 --rlimit nproc=1024:1024 "$@"; }
		limits='cd /sys/fs/cgroup; for f in memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes cpu/cpu.shares cpu/cpu.cfs_quota_us cpuset/cpuset.cpus pids/pids.max memory.max memory.swap.max cpu.weight cpu.max cpuset.cpus pids.max; do test ! -e $f || echo $f $(cat $f); done'
		mounts() { echo "cut -d' ' -f5,6,8- /proc/self/mountinfo | grep -E '^($1) ' | sort"; }
		`
	both := func(shared, theirs, ours, command string) string {
		return `pr ` + shared + ` ` + theirs + ` --rootfs "$PWD/rootfs" ` + command + ` >theirs; dr ` + shared + ` ` + ours + ` --rootfs rootfs ` + command + ` >ours; `
	}
	for _, tt := range []struct{ name, script string }{
		{"user", both(`--user web --group-add 60 --hostname one --oom-score-adj 100 -e A=b`, `--workdir /www --security-opt no-new-privileges`, `--cwd /www --no-new-privs`,
			`sh -c 'id -u; id -g; id -G; hostname; pwd; cat /proc/self/oom_score_adj; echo $A $HOME $PATH; grep -E "^(Cap[^B]|NoNew|Seccomp:|Umask)" /proc/self/status; ulimit -n; ulimit -Hn'`)},
		{"capabilities", both(`--cap-drop ALL --cap-add CHOWN --cap-add net_bind_service`, ``, ``, `grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status`)},
		{"the same capabilities", both(``, `--cap-add MKNOD --cap-add NET_RAW --cap-add AUDIT_WRITE`, ``, `grep ^Cap /proc/self/status`)},
		{"limits", both(`--memory 64m --memory-swap 96m --cpu-shares 512 --cpuset-cpus 0 --cpus 0.5`, `--pids-limit 50`, `--pids 50`, `sh -c "$limits"`)},
		{"mounts", both(`--read-only --tmpfs /t:size=1m,mode=700,exec -v $PWD/rootfs/www:/ro:ro -v $PWD/rootfs/www:/rw --mount type=bind,src=$PWD/rootfs/www,dst=/bind,ro --shm-size 1m`, `--read-only-tmpfs=false`, ``,
			`sh -c "$(mounts '/|/t|/ro|/rw|/bind|/dev/shm|/dev/mqueue|/dev/pts|/proc|/sys|/proc/sys')"`)},
		{"devices", both(`--device /dev/null:/dev/x:r --sysctl net.ipv4.ip_forward=1 --sysctl kernel.msgmax=4242`, ``, ``,
			`sh -c 'ls -l /dev/x | cut -c1-10; stat -c %t:%T /dev/x; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax; cat /dev/x && echo reads; echo 2>/dev/null >/dev/x || echo refused; ls /dev'`)},
		{"the host's namespaces", both(`--pid host --ipc host --uts host`, ``, ``, `sh -c 'for n in pid ipc uts; do readlink /proc/self/ns/$n; done; hostname'`)},
		{"privileged", both(`--privileged`, ``, ``, `sh -c 'grep -E "^(Cap|NoNew|Seccomp:)" /proc/self/status; ls /dev/net /dev/mem; '"$(mounts '/sys|/proc/sys|/proc/kcore|/sys/firmware')"`)},
		{"entrypoint", both(`--entrypoint /bin/echo`, ``, ``, `a "b  c" ''`)},
		{"status", `pr --rootfs "$PWD/rootfs" /none 2>/dev/null || echo $? >theirs; dr --rootfs rootfs /none 2>/dev/null || echo $? >ours; for c in 'exit 7' 'kill -9 $$' 'kill -HUP $$; exit 3'; do
			pr --rootfs "$PWD/rootfs" sh -c "$c" || echo $? >>theirs; dr --rootfs rootfs sh -c "$c" || echo $? >>ours; done; `},
		{"a pod", `podman run -d --name "$ID" --network none --ulimit nofile=256:256 --ulimit nproc=1024:1024 --hostname pod --shm-size 2m --ipc shareable --rootfs "$PWD/rootfs" sleep 1000 >/dev/null; dist-run -d --id "$ID" --hostname pod --shm-size 2m --rootfs rootfs sleep 1000 >/dev/null
			in='echo $(cat /proc/1/cmdline | tr "\0" " "); ls /proc | grep -c "^[0-9]*$"'
			podman run --rm --ulimit nofile=256:256 --ulimit nproc=1024:1024 --pid container:$ID --ipc container:$ID --network container:$ID --rootfs "$PWD/rootfs" sh -c "$in" >theirs; dr --pid container:$ID --ipc container:$ID --net container:$ID --rootfs rootfs sh -c "$in" >ours; podman rm -f -t 0 "$ID" >/dev/null; task rm -f "$ID" >/dev/null || true; `},
		{"a secret", `podman secret create s secret >/dev/null; pr --secret s --rootfs "$PWD/rootfs" cat /run/secrets/s >theirs; dr --secret s=secret --rootfs rootfs cat /run/secrets/s >ours; `},
	} {
		if diff := p.sh(podman + tt.script + `test -s theirs; diff theirs ours || true`); diff != "" {
			t.Errorf("%s: podman, and ours:\n%s", tt.name, diff)
		}
	}
}
