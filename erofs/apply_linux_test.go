package erofs

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"distkit/archive"
	"distkit/errclass"
)

// dump describes the files below a directory, in the form of read. The times of directories are zero: a directory that
// no entry names has the time of the extraction.
func dump(t testing.TB, root string) []string {
	t.Helper()
	inodes := map[uint64]string{}
	var lines []string
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		line := fmt.Sprintf("%s %o %d:%d @%d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %.8x", len(b), sha256.Sum256(b))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d", st.Rdev)
		}
		if first, ok := inodes[st.Ino]; ok {
			line += " = " + first
		} else if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			inodes[st.Ino] = rel
		}
		buf := make([]byte, 64<<10)
		n, _ := unix.Llistxattr(p, buf)
		for _, name := range slices.Sorted(strings.SplitSeq(string(buf[:max(n, 0)]), "\x00")) {
			if name != "" && name != "security.selinux" {
				value := make([]byte, 64<<10)
				n, _ := unix.Lgetxattr(p, name, value)
				line += fmt.Sprintf(" %s=%q", name, value[:max(n, 0)])
			}
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

// withoutTimes removes the times from the lines of directories and whiteouts: those that no entry names have the time
// of the extraction.
func withoutTimes(lines []string) []string {
	times := regexp.MustCompile(`^(.* (?:4\d{4}|20000) \d+:\d+) @-?\d+\.\d+`)
	for i := range lines {
		lines[i] = times.ReplaceAllString(lines[i], "$1")
	}
	slices.Sort(lines)
	return lines
}

// FuzzBuilder compares images with extracted layers, for any bytes. If an image is made, it shows the same files as the
// extracted layer. If one of the two fails, so must the other.
func FuzzBuilder(f *testing.F) {
	link := func(kind byte, name, target string) tarEntry {
		return tarEntry{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o644}, ""}
	}
	sparse, err := os.ReadFile("testdata/sparse.tar")
	if err != nil {
		f.Fatal(err)
	}
	for _, l := range [][]byte{
		pack(f, dir("d"), file("d/f", "x"), link(tar.TypeLink, "h", "d/f"), link(tar.TypeSymlink, "s", "d"), file("s/g", "y"), dir("s")),
		pack(f, file("a/b", "x"), file(".wh.a", ""), file("a/.wh..wh..opq", ""), file("c", ""), file("c", "again"), file(".wh.c", "")),
		pack(f, link(tar.TypeChar, "c", ""), link(tar.TypeFifo, "p", ""), xattr(file("x", "1"), "user.a", "b"), xattr(dir("x"), "trusted.a", "b")),
		pack(f, link(tar.TypeSymlink, "a", "/b/../b"), file("a/b", ""), file("../a", ""), link(tar.TypeLink, "a", "b/b")),
		sparse,
	} {
		f.Add(l, false)
		f.Add(l, true)
	}
	f.Fuzz(func(t *testing.T, layer []byte, overlay bool) {
		const bytesLimit, entriesLimit = 1 << 20, 1000
		image, _, err := build(t, Options{Overlay: overlay, MaxBytes: bytesLimit, MaxEntries: entriesLimit}, layer)
		if err != nil && errclass.Status(err) == 1 {
			t.Errorf("an error without a class: %v", err)
		}
		var shown []string
		if err == nil {
			if shown, err = read(image); err != nil {
				t.Fatal(err)
			}
			judge(t, image)
			if !overlay {
				judgeExt4(t, Options{MaxBytes: bytesLimit, MaxEntries: entriesLimit}, 0, layer)
				if again := showArchive(t, Options{MaxBytes: bytesLimit, MaxEntries: entriesLimit}, layer); !slices.Equal(again, shown) {
					t.Errorf("the archive shows\n%s\nand the image\n%s", strings.Join(again, "\n"), strings.Join(shown, "\n"))
				}
			}
		}
		if os.Geteuid() != 0 {
			return
		}
		opts := archive.Options{MaxBytes: bytesLimit, MaxEntries: entriesLimit}
		if overlay {
			opts.Whiteouts = archive.Overlay
		}
		root := t.TempDir()
		_, applied := archive.Apply(t.Context(), root, bytes.NewReader(layer), opts)
		if (err == nil) != (applied == nil) {
			t.Fatalf("the image: %v; applied: %v", err, applied)
		}
		if err != nil {
			return
		}
		if shown, there := withoutTimes(shown), withoutTimes(dump(t, root)); !slices.Equal(shown, there) {
			t.Errorf("the image shows\n%s\nwhere there is\n%s", strings.Join(shown, "\n"), strings.Join(there, "\n"))
		}
	})
}
