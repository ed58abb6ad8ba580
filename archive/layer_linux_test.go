package archive

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var then = time.Date(2017, 2, 3, 4, 5, 6, 789, time.UTC)

// An entry is a header and a body. layer fills in the fields that a test leaves empty.
type entry struct {
	tar.Header
	body string
}

func dirEntry(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}}
}

func fileEntry(name, body string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body: body}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

const (
	blockSize = 512       // of tar
	chunkSize = 256 << 10 // more than a reader reads at once
)

// layerOf writes an archive with its names as they are. tar.Writer would clean them.
func layerOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if h.ModTime.IsZero() {
			h.ModTime = then
		}
		if h.Uid == 0 {
			h.Uid, h.Gid = os.Getuid(), os.Getgid()
		}
		if h.ModTime.Nanosecond() != 0 {
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("write header of %q: %v", h.Name, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func apply(t testing.TB, root string, data []byte, opts Options) (Result, error) {
	t.Helper()
	return Apply(context.Background(), root, bytes.NewReader(data), opts)
}

func mustApply(t testing.TB, root string, data []byte, opts Options) Result {
	t.Helper()
	r, err := apply(t, root, data, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// dump describes everything below dir, one line per path. Equal trees have equal lines.
func dump(t testing.TB, dir string) []string {
	t.Helper()
	inodes := map[uint64]string{}
	var lines []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		line := fmt.Sprintf("%s %o %d:%d %d.%09d", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x", len(b), sha256.Sum256(b))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if first, ok := inodes[st.Ino]; ok {
				line += " = " + first
			} else {
				inodes[st.Ino] = rel
			}
		}
		lines = append(lines, line+xattrDump(p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return lines
}

func xattrDump(p string) string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return ""
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	s := ""
	for _, name := range names {
		if name != "" && name != "security.selinux" {
			value := make([]byte, 4096)
			n, _ := unix.Lgetxattr(p, name, value)
			s += fmt.Sprintf(" %s=%q", name, value[:max(n, 0)])
		}
	}
	return s
}

func equal(t testing.TB, got, want []string) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	shown := 0
	for _, l := range got {
		if !slices.Contains(want, l) && shown < 5 {
			t.Errorf("got      %s", l)
			shown++
		}
	}
	for _, l := range want {
		if !slices.Contains(got, l) && shown < 10 {
			t.Errorf("expected %s", l)
			shown++
		}
	}
	if shown == 0 {
		t.Errorf("got %d lines, expected %d", len(got), len(want))
	}
}

// names lists the names below dir, as find does.
func names(t testing.TB, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, p); rel != "." {
			list = append(list, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// A jail is a target with the files around it that a layer might try to reach.
type jail struct{ outside, root string }

func newJail(t testing.TB) jail {
	t.Helper()
	outside := t.TempDir()
	root := filepath.Join(outside, "some", "deep", "root")
	for _, d := range []string{"etc", "tmp", "some/etc", "some/deep/etc", "some/deep/tmp"} {
		p := filepath.Join(outside, d)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p, "passwd"), []byte("outside"), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	return jail{outside, root}
}

// around is a dump of everything except the target. Of the target, link count and times are left out.
func (j jail) around(t testing.TB) []string {
	t.Helper()
	aside := filepath.Join(filepath.Dir(j.outside), cmp.Or(filepath.Base(j.outside), "x")+".root")
	if err := os.Rename(j.root, aside); err != nil {
		t.Fatal(err)
	}
	parent := filepath.Dir(j.root)
	if err := os.Chtimes(parent, then, then); err != nil {
		t.Fatal(err)
	}
	lines := dump(t, j.outside)
	if err := os.Rename(aside, j.root); err != nil {
		t.Fatal(err)
	}
	return lines
}

// open opens a path as it is seen from inside the target.
func (j jail) open(p string, flags uint64) (*os.File, error) {
	r, err := unix.Open(j.root, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(r)
	fd, err := unix.Openat2(r, strings.TrimPrefix(p, "/"), &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p, err)
	}
	return os.NewFile(uintptr(fd), p), nil
}

func openFDs(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
