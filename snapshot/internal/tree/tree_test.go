package tree

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/snapshot/snapshottest"

	"distkit/disk/sys"

	"golang.org/x/sys/unix"
)

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plant makes a tree with a file of every sort. Without root it leaves out what needs it.
func plant(t *testing.T, dir string) {
	t.Helper()
	p := func(name string) string { return filepath.Join(dir, name) }
	ok(t, os.WriteFile(p("small"), []byte("small"), 0o640))
	ok(t, os.WriteFile(p("empty"), nil, 0o600))
	ok(t, os.WriteFile(p("large"), []byte(strings.Repeat("large\n", 100_000)), 0o644))
	sparse, err := os.Create(p("sparse"))
	ok(t, err)
	_, err = sparse.WriteAt([]byte("middle"), 4<<20)
	ok(t, err)
	ok(t, sparse.Truncate(8<<20))
	ok(t, sparse.Close())
	ok(t, os.MkdirAll(p("dir/sub/deep"), 0o755))
	ok(t, os.Link(p("small"), p("dir/sub/link")))
	ok(t, os.Symlink("../../small", p("dir/symlink")))
	ok(t, os.Symlink("/etc", p("dir/away")))
	ok(t, unix.Mkfifo(p("pipe"), 0o620))
	ok(t, os.Link(p("pipe"), p("dir/pipe")))
	ok(t, os.WriteFile(p("-odd \n\xff name"), []byte("x"), 0o604))
	ok(t, unix.Setxattr(p("dir"), "user.test", []byte("of a directory"), 0))
	ok(t, unix.Setxattr(p("large"), "user.long", []byte(strings.Repeat("v", 900)), 0))
	if os.Geteuid() == 0 {
		ok(t, unix.Mknod(p("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		ok(t, unix.Mknod(p("whiteout"), unix.S_IFCHR, 0))
		ok(t, os.Lchown(p("dir/symlink"), 12, 34))
		ok(t, os.Chown(p("dir/sub"), 1000, 1001))
		ok(t, os.WriteFile(p("suid"), []byte("s"), 0o755))
		ok(t, os.Chown(p("suid"), 33, 33))
		ok(t, os.Chmod(p("suid"), 0o755|os.ModeSetuid|os.ModeSetgid))
		// cap_net_raw+ep
		ok(t, unix.Setxattr(p("suid"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
		ok(t, unix.Lsetxattr(p("dir/symlink"), "trusted.link", []byte("l"), 0))
	}
	ok(t, os.Chmod(p("dir/sub/deep"), 0o000))
	ok(t, os.Chmod(p("dir"), 0o1777))
	for i, name := range []string{"small", "large", "dir/symlink", "pipe", "dir/sub/deep", "dir/sub", "dir", "."} {
		at := unix.NsecToTimespec(time.Date(2001, 2, 3, 4, 5, i, 123456789, time.UTC).UnixNano())
		ok(t, unix.UtimesNanoAt(unix.AT_FDCWD, p(name), []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// describe is a line for each file: everything that a copy must keep.
func describe(t *testing.T, dir string) []string {
	t.Helper()
	links := map[uint64]string{}
	var out []string
	ok(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil && os.Geteuid() == 0 {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		first := links[st.Ino]
		if first == "" {
			first = rel
			links[st.Ino] = rel
		}
		line := fmt.Sprintf("%q mode %o owner %d:%d dev %d mtime %d link of %q", rel, st.Mode, st.Uid, st.Gid, st.Rdev, unix.TimespecToNsec(st.Mtim), first)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d sum %x", st.Size, sum(b))
		case unix.S_IFLNK:
			to, _ := os.Readlink(path)
			line += " to " + to
		}
		names, err := sys.Grow(pathXattrs{path}.list)
		if err == nil && len(names) > 0 {
			all := strings.Split(strings.TrimSuffix(string(names), "\x00"), "\x00")
			slices.Sort(all)
			for _, n := range all {
				v, err := sys.Grow(func(b []byte) (int, error) { return unix.Lgetxattr(path, n, b) })
				if err != nil {
					return err
				}
				line += fmt.Sprintf(" %s=%x", n, v)
			}
		}
		out = append(out, line)
		return nil
	}))
	return out
}

func sum(b []byte) (n uint64) {
	for _, c := range b {
		n = n*1099511628211 + uint64(c)
	}
	return n
}

func TestCopyKeepsEverything(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	plant(t, src)
	defer os.Chmod(filepath.Join(src, "dir/sub/deep"), 0o700)
	if os.Geteuid() != 0 {
		ok(t, os.Chmod(filepath.Join(src, "dir/sub/deep"), 0o500))
	}
	want := describe(t, src)
	defer unix.Umask(unix.Umask(0o077))
	ok(t, Copy(context.Background(), src, dst))
	got := describe(t, dst)
	for i := range max(len(want), len(got)) {
		var w, g string
		if i < len(want) {
			w = want[i]
		}
		if i < len(got) {
			g = got[i]
		}
		if w != g {
			t.Errorf("copied as\n %s\nnot\n %s", g, w)
		}
	}
	var st unix.Stat_t
	ok(t, unix.Stat(filepath.Join(dst, "sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the sparse file takes %d bytes", st.Blocks*512)
	}

	size, inodes, err := Usage(context.Background(), src)
	ok(t, err)
	if n := int64(len(want) - 2); inodes != n { // two are links
		t.Errorf("usage counts %d inodes, not %d", inodes, n)
	}
	if size < 600_000 || size > 2<<20 {
		t.Errorf("usage counts %d bytes", size)
	}
	ok(t, Remove(dst))
	if _, err := os.Lstat(dst); !os.IsNotExist(err) {
		t.Errorf("after Remove: %v", err)
	}
	ok(t, Remove(dst))
	if got := describe(t, src); !slices.Equal(got, want) {
		t.Error("Copy or Remove changed the source")
	}
}

func TestCopyEnds(t *testing.T) {
	src := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Copy(ctx, src, t.TempDir()); err == nil {
		t.Error("copied under a cancelled context")
	}
}

// Nothing that is mounted in a tree may be deleted with it.
func TestRemoveStopsAtMounts(t *testing.T) {
	snapshottest.Root(t)
	outside, dir := t.TempDir(), t.TempDir()
	ok(t, os.WriteFile(filepath.Join(outside, "precious"), nil, 0o644))
	mnt := filepath.Join(dir, "a/mnt")
	ok(t, os.MkdirAll(mnt, 0o755))
	ok(t, unix.Mount(outside, mnt, "", unix.MS_BIND, ""))
	err := Remove(dir)
	ok(t, unix.Unmount(mnt, 0))
	if err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("Remove of a tree with a mount: %v", err)
	}
	if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
		t.Errorf("what was mounted is gone: %v", err)
	}
}
