//go:build e2e

package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"distkit/testdata/fixture"
)

// TestDelegatedCgroup: an ordinary user's container has a cgroup below the user's own if that was delegated, with what the kernel counts, and is paused by it. What
// the cgroup has no controllers for is refused in a clear line, as everything is that needs a cgroup if there is none.
func TestDelegatedCgroup(t *testing.T) {
	fixture.Need(t, "root,runc,busybox,newuidmap,userns,jq")
	p := before(t, http.NotFoundHandler())
	p.t = t
	p.id()
	p.sh(`mkdir -p rootfs/bin && cp "$(command -v busybox)" rootfs/bin/ && ln -s busybox rootfs/bin/sleep && ln -s busybox rootfs/bin/cat; chown -R 1000:1000 rootfs`)
	p.user()
	user := p.before
	tree := "/sys/fs/cgroup/unified"
	if _, err := os.Stat(tree); err != nil {
		tree = "/sys/fs/cgroup"
	}
	tree = filepath.Join(tree, "e2e-"+filepath.Base(filepath.Dir(p.dir)))
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.before = ""; p.sh(`find "$0" -depth -type d -exec rmdir {} +`, tree) })
	const script = `say() { s=0; "$@" 2>&1 || s=$?; echo "$s"; }
		{ dist-run -d --id $ID --rootfs rootfs sleep 1000 >/dev/null; tail -n 1 /proc/$(task ps -q $ID)/cgroup
		if s=$(task stats --json $ID 2>/dev/null); then jq '.cpu > 0' <<<"$s"; else say task stats $ID; fi; say task pause $ID; task ls | cut -f3; [[ $(task ls | cut -f3) != paused ]] || task resume $ID
		say task update --pids 10 $ID; say dist-run --rm --id $ID-2 --pids 10 --rootfs rootfs cat /dev/null
		task rm -f $ID >/dev/null || true; find /sys/fs/cgroup -name "distkit-*$ID*"; } | sed -e "s/$ID/ID/g" -e 's/;.*//' -e 's/-[0-9a-f]\{16\}/-RANDOM/g'`
	p.before = `echo $$ >` + tree + `/cgroup.procs && exec unshare --cgroup sh -c 'umount -R -l /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup && cd /sys/fs/cgroup && mkdir -p user/caller &&
		chown 1000 user user/caller user/caller/cgroup.procs user/caller/cgroup.subtree_control user/cgroup.procs user/cgroup.subtree_control && echo $$ >user/caller/cgroup.procs && cd "$OLDPWD" && exec "$0" "$@"' sh -c ` +
		`'` + user + `'` + ` "$0" "$@"; false`
	for _, want := range []string{
		"0::/user/caller/distkit-ID-RANDOM\ntrue\n0\npaused\n" +
			"task: update: container ID: no limits by the cgroup controllers pids: the cgroup /sys/fs/cgroup/user/caller/distkit-ID-RANDOM lacks them, or has processes and is not delegated\n9\n" +
			"run: container ID-2: no limits by the cgroup controllers pids: the cgroup /user/caller lacks them, or has processes and is not delegated\n125",
		"0::/\ntask: stats: container ID has no cgroups of its own\n8\ntask: pause: container ID has no cgroups of its own\n8\nrunning\n" +
			"task: update: container ID has no cgroups of its own\n8\nrun: container ID-2: no limits by the cgroup controllers pids: this user can't make cgroups\n125",
	} {
		if got := p.sh(script); got != want {
			t.Errorf("%s\nnot\n%s", got, want)
		}
		p.before = user // without a cgroup of its own
	}
}
