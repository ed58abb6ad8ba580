//go:build e2e

package e2e

import (
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"distkit/testdata/fixture"
)

const tiny = "./images/tiny:latest"

// unpacked pulls the image and applies its layers to the directory root.
func (p *place) unpacked() {
	p.t.Helper()
	p.sh(`
dist-pull -q ` + image + `
mkdir root mnt
dist-image layers ` + image + ` | while IFS=$'\t' read -r digest _ _ diffid _; do
	dist-cat "$digest" | dist-apply --strict --expect-diff-id "$diffid" root >&2
done`)
}

// TestDisk: an image as each format, judged by the format's own program, mounted, and compared with its layers applied to a directory.
func TestDisk(t *testing.T) {
	p := here(t)
	fixture.Need(t, "fsck.erofs,mkfs.erofs,e2fsck,tar2sqfs,unsquashfs")
	p.unpacked()
	t.Cleanup(func() { _ = fixture.Unmount(p.dir) })
	for _, c := range []struct{ format, flags, judge string }{
		{"erofs", "", "fsck.erofs"},
		{"erofs", "--compress lz4", "fsck.erofs"},
		{"squashfs", "--compress gzip", "unsquashfs -s"},
		{"ext4", "--size 300m", "e2fsck -fn"},
	} {
		p.set("FORMAT="+c.format, "FLAGS="+c.flags, "JUDGE="+c.judge)
		p.sh(`
dist-disk --strict --format $FORMAT $FLAGS -o disk ` + image + `
$JUDGE disk >&2
mount -t "$FORMAT" -o ro,loop disk mnt
# Only the time of the root directory, which no layer names, may differ.
dist-diff --compress none root mnt >changes
tar -t <changes | { grep -vx ./ || true; } >differ
umount mnt
head -n 20 differ >&2
[[ ! -s differ ]]`)
	}
	p.sh(`
dist-disk --format tar ` + image + ` >disk.tar
mkdir again
tar -xp --numeric-owner --xattrs --xattrs-include='*' -f disk.tar -C again
dist-diff --compress none root again >changes
tar -t <changes | { grep -vx ./ || true; } >differ
[[ ! -s differ ]]`)

	// A file system with a journal can be written to, and grows.
	p.sh(`
truncate -s 600m disk
resize2fs disk >&2
e2fsck -fn disk >&2
mount -t ext4 -o loop disk mnt
head -c 300000000 /dev/zero >mnt/large
mkdir mnt/etc/new
rm -r mnt/usr/share/doc
umount mnt
e2fsck -fn disk >&2`)
}

// TestDiskFull: where there is no room, at any step, nothing is left.
func TestDiskFull(t *testing.T) {
	p := before(t, http.NotFoundHandler())
	fixture.Need(t, "root,tmpfs,tar2sqfs")
	p.images()
	p.sh(`dist-pull -q ` + tiny + ` && mkdir small`)
	t.Cleanup(func() { _ = fixture.Unmount(p.dir) })
	p.sh(`echo $(($(dist-disk --format tar ` + tiny + ` | wc -c) * 5 / 4)) >most`) // the layers fit, and a part of the file, but of squashfs
	for _, c := range [][2]string{{"erofs", "64k"}, {"erofs", "most"}, {"ext4", "most"}, {"tar", "most"}, {"squashfs", "64k"}, {"squashfs", "layers"}} {
		p.set("FORMAT="+c[0], "SIZE="+c[1])
		p.sh(`
case $SIZE in
most) SIZE=$(<most) ;;
layers) SIZE=$(($(<most) * 4 / 5 + 100000)) ;; # and hardly more
esac
mount -t tmpfs -o size=$SIZE none small
status=0
dist-disk --format $FORMAT -o small/disk ` + tiny + ` 2>errors || status=$?
[[ $status == 1 && $(wc -l <errors) == 1 && -z $(ls -A small) ]] || { echo "status $status" >&2; cat errors >&2; ls -la small >&2; exit 1; }
umount small`)
	}
}

// TestDiskKilled: what was killed at any time leaves no file of the name, or a whole one.
func TestDiskKilled(t *testing.T) {
	p := before(t, http.NotFoundHandler())
	fixture.Need(t, "tar2sqfs")
	p.images()
	p.sh(`dist-pull -q ` + tiny)
	for _, format := range []string{"erofs", "ext4", "squashfs"} {
		whole := filepath.Join(p.dir, format)
		p.set("FORMAT=" + format)
		p.sh(`dist-disk --format $FORMAT -o $FORMAT ` + tiny)
		want, err := os.Stat(whole)
		if err != nil {
			t.Fatal(err)
		}
		for after := 10 * time.Millisecond; ; after *= 2 {
			c := exec.Command("dist-disk", "--format", format, "-o", "killed", tiny)
			c.Dir, c.Env = p.dir, p.Vars
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(after)
			_ = c.Process.Kill()
			ended := c.Wait() == nil
			got, err := os.Stat(filepath.Join(p.dir, "killed"))
			if err == nil && got.Size() != want.Size() || err != nil && !os.IsNotExist(err) {
				t.Fatalf("%s after %v: %v, %v", format, after, got, err)
			}
			if ended {
				break
			}
		}
		p.sh(`cmp killed $FORMAT && rm -f killed .dist-disk-*`)
	}
}
