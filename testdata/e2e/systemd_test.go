//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"distkit/testdata/fixture"
)

// systemd boots a systemd, as the first process of a PID namespace, that runs the script in the file script as a unit, and ends with it. It has a copy-on-write view of
// the host's files, and a /run, a cgroup tree of version 2 and mounts of its own. It starts no unit of the host's. UNIT is the file of the template distkit@.
const systemd = `
top=$PWD; mkdir view; mount -t tmpfs tmpfs view; mkdir view/upper view/work view/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$top/view/upper,workdir=$top/view/work" view/root
root=$top/view/root
mount -t proc proc "$root/proc"; for d in run tmp; do mount -t tmpfs tmpfs "$root/$d"; done
for d in /sys /dev "$BIN" "$top"; do mkdir -p "$root$d"; mount --rbind --make-rslave "$d" "$root$d"; done
umount --recursive --lazy "$root/sys/fs/cgroup" || true; mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
rm -rf "$root"/{usr/lib,lib,etc}/systemd/system/*.{wants,requires} "$root/etc/distkit"; generators=$root/etc/systemd/system-generators; mkdir -p "$generators" "$root/etc/distkit"
for g in "$root"/{usr/lib,lib}/systemd/system-generators/*; do ln -sf /dev/null "$generators/${g##*/}"; done
ln -sf "$BIN"/* "$root/usr/local/bin/"
cp "$UNIT" "$root/etc/systemd/system/"
printf '[Service]\nEnvironment=DIST_ROOT=%s\nStandardOutput=append:%s\nStandardError=append:%s\n' "$top/.content" "$top/service.log" "$top/service.log" >drop-in
mkdir "$root/etc/systemd/system/distkit@.service.d"; cp drop-in "$root/etc/systemd/system/distkit@.service.d/e2e.conf"
for n in "$ID" "$ID-parent"; do printf 'IMAGE=%s\nFLAGS=--net none\nCOMMAND=sleep 4009\n' "$IMAGE" >"$root/etc/distkit/$n.conf"; done
sed -i 's/^FLAGS=.*/& --cgroup-parent \/e2e.slice/' "$root/etc/distkit/$ID-parent.conf"
printf '[Unit]\nDefaultDependencies=no\n[Service]\nWorkingDirectory=%s\nEnvironment=ID=%s PATH=/usr/local/bin:%s DIST_ROOT=%s\nExecStart=/bin/bash -euo pipefail %s/script\nExecStopPost=systemctl --no-block exit\nStandardOutput=file:%s\nStandardError=inherit\n' \
	"$top" "$ID" "$PATH" "$top/.content" "$top" "$top/out" >"$root/etc/systemd/system/e2e.service"
exec chroot "$root" env -i container=e2e PATH="$PATH" /lib/systemd/systemd --system --unit=e2e.service --log-target=console --show-status=false </dev/null`

// The unit that comes with distkit starts and stops a container, at any moment of its start, and nothing of it is left. Killed, it is started again.
func (p *place) systemd(t *testing.T) {
	fixture.Need(t, "systemctl,findmnt")
	p.write("script", `
left() { find /sys/fs/cgroup -name "*$ID-*"; pgrep -f '^sleep 4009' || true; }
grep_cgroup() { until pid=$(pgrep -f '^sleep 4009'); do sleep 0.02; done; grep -c "0::.*$1" "/proc/$pid/cgroup"; }
unit=distkit@$ID
systemctl start $unit
task ls -q; grep_cgroup "/$unit.service/distkit-$ID-"
for n in $(seq 0 19); do
	systemctl stop $unit; left; systemctl show -P Result $unit
	systemctl start --no-block $unit; sleep 0.$(printf %03d $((n * 25)))
done | uniq -c
systemctl stop $unit; systemctl start $unit
systemctl kill --kill-whom=main --signal=KILL $unit; until systemctl is-active -q $unit; do sleep 0.05; done; systemctl show -P NRestarts $unit
systemctl stop $unit; left
systemctl start $unit-parent; grep_cgroup "/e2e.slice/distkit-$ID-parent-"; systemctl stop $unit-parent; left
find .content/containers /run/distkit -name "*$ID*" 2>/dev/null || true; findmnt -rn -o TARGET | grep -F "$PWD/.content/" || true
`)
	unit, err := filepath.Abs("../../contrib/distkit@.service")
	if err != nil {
		t.Fatal(err)
	}
	tree := "/sys/fs/cgroup/unified"
	if _, err := os.Stat(tree); err != nil {
		tree = "/sys/fs/cgroup"
	}
	tree = filepath.Join(tree, "e2e-"+filepath.Base(filepath.Dir(p.dir)))
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.sh(`find "$0" -depth -type d -exec rmdir {} +`, tree) })
	got := p.sh(`echo $$ >"$0/cgroup.procs"; export BIN=$1 UNIT=$2 IMAGE=`+single+`
		unshare --mount --pid --fork --cgroup --ipc --uts --kill-child bash -euo pipefail -c "$3"; sed "s/$ID/ID/" out`, tree, fixture.Bin, unit, systemd)
	if want := "ID\n1\n     20 success\n1\n1"; got != want {
		t.Errorf("%q, not %q\n%s", got, want, p.sh("tail service.log"))
	}
}
