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

// plant makes a tree with a file of every type. Without root it leaves out those that need root.
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

// describe returns a line for each file, with everything that a copy must keep.
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
	if n := int64(len(want) - 2); inodes != n { // two of them are hard links
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

// A mount in a tree is not deleted with it.
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

// fewDescriptors limits the process to n descriptors until the test ends.
func fewDescriptors(t *testing.T, n uint64) {
	t.Helper()
	var was unix.Rlimit
	ok(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	ok(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: was.Max}))
	t.Cleanup(func() { ok(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) })
}

// deepen makes nested directories. Each has a file, an empty directory and a full one.
func deepen(t *testing.T, dir string, levels int) {
	t.Helper()
	at, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	ok(t, err)
	for range levels {
		ok(t, unix.Mkdirat(at, "d", 0o500))
		fd, err := unix.Openat(at, "2", unix.O_CREAT|unix.O_WRONLY, 0o600)
		ok(t, err)
		ok(t, unix.Close(fd))
		ok(t, unix.Mkdirat(at, "0", 0o700))
		ok(t, unix.Mkdirat(at, "1", 0o700))
		ok(t, unix.Mkdirat(at, "1/full", 0o700))
		next, err := unix.Openat(at, "d", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		ok(t, err)
		ok(t, unix.Fchmod(next, 0o700))
		ok(t, unix.Close(at))
		at = next
	}
	ok(t, unix.Close(at))
}

// A deep tree is measured, copied and deleted with a few descriptors.
func TestDeepTrees(t *testing.T) {
	const levels = 300
	dir := filepath.Join(t.TempDir(), "top")
	ok(t, os.Mkdir(dir, 0o755))
	deepen(t, dir, levels)
	other := filepath.Join(t.TempDir(), "base")
	ok(t, os.Mkdir(other, 0o755))
	deepen(t, other, levels/2)
	fewDescriptors(t, 160)
	_, inodes, err := Usage(t.Context(), dir)
	if want := int64(5*levels + 1); err != nil || inodes != want {
		t.Errorf("Usage: %d inodes, %v, of %d", inodes, err, want)
	}
	if _, beyond, err := UsageBeyond(t.Context(), dir, other); err != nil || beyond != inodes {
		t.Errorf("UsageBeyond of other files: %d inodes, %v, of %d", beyond, err, inodes)
	}
	if _, beyond, err := UsageBeyond(t.Context(), dir, dir); err != nil || beyond != 1 {
		t.Errorf("UsageBeyond of the same files: %d inodes, %v", beyond, err)
	}
	copied := filepath.Join(t.TempDir(), "copied")
	ok(t, os.Mkdir(copied, 0o755))
	if err := Copy(t.Context(), dir, copied); err != nil {
		t.Errorf("Copy: %v", err)
	} else if _, again, err := Usage(t.Context(), copied); err != nil || again != inodes {
		t.Errorf("the copy has %d inodes (%v), not %d", again, err, inodes)
	}
	ok(t, Remove(copied))
	ok(t, Remove(dir))
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("Remove has left the tree: %v", err)
	}
	ok(t, Remove(other))
}

// Flags of chattr(1), which a container may have set, do not keep files from being deleted.
func TestRemoveImmutable(t *testing.T) {
	snapshottest.Root(t)
	dir := filepath.Join(t.TempDir(), "top")
	ok(t, os.MkdirAll(filepath.Join(dir, "append/sub"), 0o755))
	ok(t, os.WriteFile(filepath.Join(dir, "append/file"), nil, 0o644))
	ok(t, os.WriteFile(filepath.Join(dir, "fixed"), nil, 0o644))
	for name, flag := range map[string]int{"fixed": 0x10, "append": 0x20, "append/file": 0x30} {
		f, err := os.Open(filepath.Join(dir, name))
		ok(t, err)
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flag)
		f.Close()
		if err != nil {
			snapshottest.Require(t, "chattr", err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "fixed")); err == nil {
		t.Fatal("the flag has no effect")
	}
	ok(t, Remove(dir))
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("Remove has left the tree: %v", err)
	}
}
