package archive

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// changeLate makes a test's changes in a tree of 20 directories with 20 files each. One of them changes only the
// content of a file, and keeps its size and times.
func changeLate(t *testing.T, dir string) {
	t.Helper()
	p := filepath.Join(dir, "d3", "f3")
	fi, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	shell(t, dir, `printf same > d3/f3; echo longer >> d4/f4; rm d5/f5; mv d6/f6 d6/g6; ln d7/f7 d7/g7; chmod 700 d8; rm -r d9; mkdir -p d10/new/newer; rm d12/f12; echo new > d12/f12`)
	if err := unix.Setxattr(filepath.Join(dir, "d11", "f11"), "user.x", []byte("1"), 0); err != nil && err != unix.ENOTSUP {
		t.Fatal(err)
	}
	if err := os.Chtimes(p, time.Time{}, fi.ModTime()); err != nil {
		t.Fatal(err)
	}
}

func manySmall(t *testing.T, dir string) {
	t.Helper()
	shell(t, dir, `for d in $(seq 20); do mkdir d$d; for f in $(seq 20); do echo $d$f > d$d/f$f; done; done; printf abcd > d3/f3; ln d13/f13 d13/g13; ln -s f1 d14/l`)
}

// checkUnchanged compares two layers of the same trees. For one of them, some files are known to be unchanged; for the
// other, which compares with a copy of the lower tree, nothing is known.
func checkUnchanged(t *testing.T, lower, upper string) {
	t.Helper()
	copied := copyTree(t, lower)
	var known, read []byte
	few := calls(func() { known = mustDiff(t, lower, upper, DiffOptions{Compression: Uncompressed}) })
	many := calls(func() { read = mustDiff(t, copied, upper, DiffOptions{Compression: Uncompressed}) })
	if !bytes.Equal(known, read) {
		t.Errorf("the layers differ:\n%q\n%q", list(t, known), list(t, read))
	}
	if len(list(t, known)) < 12 {
		t.Errorf("it holds %q", list(t, known))
	}
	if few*2 > many {
		t.Errorf("%d calls where %d are made if all is read", few, many)
	}
}

func TestDiffOfOverlayMounts(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for _, d := range []string{"lower", "empty", "view", "upper"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	lower := filepath.Join(dir, "lower")
	manySmall(t, lower)
	view := filepath.Join(dir, "view")
	if err := unix.Mount("overlay", view, "overlay", unix.MS_RDONLY, fmt.Sprintf("lowerdir=%s:%s", lower, filepath.Join(dir, "empty"))); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(view, unix.MNT_DETACH) })
	up := mountOverlay(t, dir, lower, filepath.Join(dir, "upper"))
	n, err := openTop(up)
	if err != nil {
		t.Fatal(err)
	}
	defer n.close()
	if overlayHandleOf(&node{parent: n.fd, name: "d1"}) == nil {
		t.Skip("overlayfs gives no handles here (before Linux 6.6)")
	}
	changeLate(t, up)
	checkUnchanged(t, view, up)
}

func TestDiffOfBtrfsSnapshots(t *testing.T) {
	needRoot(t)
	for _, tool := range []string{"mkfs.btrfs", "btrfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	dir := t.TempDir()
	shell(t, dir, `truncate -s 200M image; mkfs.btrfs -q image; mkdir m; mount -o loop image m || exit 77`)
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "m"), unix.MNT_DETACH) })
	defer func(d time.Duration) { writeDelay = d }(writeDelay)
	writeDelay = 0
	shell(t, filepath.Join(dir, "m"), `btrfs -q subvolume create base`)
	lower := filepath.Join(dir, "m", "base")
	manySmall(t, lower)
	shell(t, filepath.Join(dir, "m"), `sleep 0.05; btrfs -q subvolume snapshot base w; btrfs -q subvolume snapshot -r base view; sleep 0.05`)
	for _, lower := range []string{"base", "view"} {
		t.Run(lower, func(t *testing.T) {
			if lower == "base" {
				changeLate(t, filepath.Join(dir, "m", "w"))
			}
			checkUnchanged(t, filepath.Join(dir, "m", lower), filepath.Join(dir, "m", "w"))
		})
	}
}
