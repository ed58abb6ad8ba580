package erofs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// ext4Of writes an ext4 file system of layers to a file.
func ext4Of(t testing.TB, opts Options, size int64, layers ...[]byte) (image string, unset map[string]int64, err error) {
	t.Helper()
	opts.Scratch = t.TempDir()
	b := NewBuilder(opts)
	defer b.Close()
	for _, l := range layers {
		if err := b.Add(t.Context(), bytes.NewReader(l), ""); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(opts.Scratch, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return f.Name(), b.Unset(), b.WriteExt4(t.Context(), f, size)
}

// e2fsprogs returns the path of a program of e2fsprogs. Debian installs them in /sbin, which is not on an ordinary
// user's PATH.
func e2fsprogs(name string) string {
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	return filepath.Join("/usr/sbin", name)
}

// judgeExt4 writes an ext4 file system of layers, and checks it with e2fsck if that is installed.
func judgeExt4(t testing.TB, opts Options, size int64, layers ...[]byte) (image string) {
	t.Helper()
	image, _, err := ext4Of(t, opts, size, layers...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath(e2fsprogs("e2fsck")); err != nil {
		return image
	}
	if out, err := exec.Command(e2fsprogs("e2fsck"), "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
	return image
}

// debugfs returns debugfs's answer to a request.
func debugfs(t *testing.T, image, request string) string {
	t.Helper()
	if _, err := exec.LookPath(e2fsprogs("debugfs")); err != nil {
		t.Skip("wants debugfs")
	}
	out, err := exec.Command(e2fsprogs("debugfs"), "-R", request, image).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	return string(out)
}

// Files that cross the end of a block group, and more files than one group has inodes for.
func TestExt4Groups(t *testing.T) {
	t.Parallel()
	body := strings.Repeat("0123456789abcdef", 150<<20/16)
	entries := []tarEntry{file("large", body), dir("d")}
	for i := range 34000 {
		entries = append(entries, file(fmt.Sprint("d/", i), ""))
	}
	layer := pack(t, entries...)
	image := judgeExt4(t, Options{}, 0, layer)
	if info, err := os.Stat(image); err != nil || info.Size() > 180<<20 {
		t.Errorf("the files take %d bytes, %v", info.Size(), err)
	}
	judgeExt4(t, Options{}, 9<<30, layer) // with copies of the superblock in all groups that should have one
	if got := debugfs(t, image, "cat /large"); got != body {
		t.Errorf("%d bytes, and not those of the file", len(got))
	}
}

// A file with many extents needs nodes for them.
func TestExt4Sparse(t *testing.T) {
	t.Parallel()
	sparse, err := os.ReadFile("testdata/sparse.tar")
	if err != nil {
		t.Fatal(err)
	}
	judgeExt4(t, Options{}, 0, sparse)
	x := &ext4{perGroup: 16, groups: 1}
	for _, runs := range []int{0, 4, 5, 340, 341, 340*4 + 1, 340 * 340} {
		n := &inode{mode: typeFile, size: int64(runs) << 13, rare: &rare{}}
		for i := range runs {
			n.rare.runs = append(n.rare.runs, run{chunk: uint32(2 * i), chunks: 1})
		}
		p := place{ext4: x}
		l := p.plan(n)
		var beside [60]byte
		nodes, count, found := l.extents(beside[:]), map[uint32][]byte{}, 0
		i := 0
		for _, level := range l.levels {
			for _, block := range level {
				count[block] = nodes[i]
				i++
			}
		}
		var walk func(b []byte)
		walk = func(b []byte) {
			for e := range int(little.Uint16(b[2:])) {
				d := b[12+12*e:]
				if little.Uint16(b[6:]) > 0 {
					walk(count[little.Uint32(d[4:])])
					continue
				}
				if little.Uint32(d) != uint32(2*found) || little.Uint32(d[8:]) != l.data[found].block {
					t.Fatalf("%d runs: extent %d is %x", runs, found, d[:12])
				}
				found++
			}
		}
		if walk(beside[:]); found != runs || i != len(nodes) || l.blocks() != int64(runs+len(nodes)) {
			t.Errorf("%d runs: %d found, %d nodes", runs, found, len(nodes))
		}
	}
}

func TestExt4Size(t *testing.T) {
	t.Parallel()
	layer := pack(t, file("a", strings.Repeat("x", 3<<20)))
	image := judgeExt4(t, Options{}, 64<<20+5, layer)
	if info, err := os.Stat(image); err != nil || info.Size() != 64<<20 {
		t.Errorf("it has %d bytes, %v", info.Size(), err)
	}
	if s := debugfs(t, image, "stats"); !strings.Contains(s, "has_journal") {
		t.Error(s)
	}
	for _, size := range []int64{128<<20 + 1<<20, 128<<20 + 4<<20, 256 << 20} { // with a last group that has hardly any room
		judgeExt4(t, Options{}, size, layer)
	}
	if _, _, err := ext4Of(t, Options{}, 6<<20, layer); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("too small: %v", err)
	}
	if _, _, err := ext4Of(t, Options{}, 1<<20, layer); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("too small for any file: %v", err)
	}
	b := NewBuilder(Options{Scratch: t.TempDir()})
	defer b.Close()
	if err := b.Add(t.Context(), bytes.NewReader(layer), ""); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := b.WriteExt4(t.Context(), &out, 64<<20); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, out.Bytes()) {
		t.Errorf("a file has other bytes than a stream: %v", err)
	}
}

// Attributes that do not fit into a block, and times out of range, are left out and counted.
func TestExt4LeavesOut(t *testing.T) {
	t.Parallel()
	late := xattr(xattr(file("late", ""), "user.a", strings.Repeat("a", 4000)), "user.b", strings.Repeat("b", 100))
	late.ModTime = time.Unix(1<<34, 0)
	l := pack(t, late, tarEntry{tar.Header{Typeflag: tar.TypeLink, Name: "again", Linkname: "late"}, ""})
	image := judgeExt4(t, Options{}, 0, l)
	_, unset, err := ext4Of(t, Options{}, 0, l)
	if err != nil || len(unset) != 2 || unset["times"] != 1 || unset["user attributes"] != 1 {
		t.Errorf("left out: %v, %v", unset, err)
	}
	if s := debugfs(t, image, "ea_list /again"); !strings.Contains(s, "user.a (4000)") || strings.Contains(s, "user.b") {
		t.Error(s)
	}
	if _, _, err := ext4Of(t, Options{Strict: true}, 0, l); !errdefs.IsNotImplemented(err) {
		t.Errorf("strict: %v", err)
	}
}

// Without 64-bit block numbers, the number of blocks has 32 bits.
func TestExt4TooLarge(t *testing.T) {
	t.Parallel()
	for _, size := range []int64{1<<44 - 1<<20 + 4096, 1 << 44, 1 << 50} {
		b := NewBuilder(Options{})
		defer b.Close()
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer write.Close()
		read.Close() // a writer that goes on anyway then fails
		if err := b.WriteExt4(t.Context(), write, size); errdefs.IsFailedPrecondition(err) != (size >= 1<<44) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}
