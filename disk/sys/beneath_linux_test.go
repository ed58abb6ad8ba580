package sys

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// deepTree makes a chain of directories below dir, each of which holds a file.
func deepTree(t *testing.T, dir string, levels int) {
	t.Helper()
	fd, err := Open(dir, OpenDir, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range levels {
		f, err := Openat(fd, "file", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
		if err == nil {
			_ = unix.Close(f)
			err = Mkdirat(fd, "d", 0o755)
		}
		below := -1
		if err == nil {
			below, err = OpenBeneath(fd, "d", OpenDir, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		_ = unix.Close(fd)
		fd = below
	}
	_ = unix.Close(fd)
}

// openTop opens the directory that contains a test's tree.
func openTop(t *testing.T, dir string) int {
	t.Helper()
	fd, err := Open(dir, OpenDir, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// A tree that is deeper than the number of files that a process may have open is removed. It takes as many calls per
// directory as a flat tree.
func TestRemoveAllOfADeepTree(t *testing.T) {
	const levels, perDirectory = 5000, 20
	dir := t.TempDir()
	top := filepath.Join(dir, "top")
	if err := os.Mkdir(top, 0o755); err != nil {
		t.Fatal(err)
	}
	deepTree(t, top, levels)
	fd := openTop(t, dir)
	before := openFiles(t)
	most, calls := 0, 0
	Calling = func() {
		if calls++; calls%1000 == 0 {
			most = max(most, openFiles(t))
		}
	}
	err := RemoveAll(fd, "top")
	Calling = nil
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(top); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	if most > before+maxDepth+8 {
		t.Errorf("%d files were open, where %d were before", most, before)
	}
	if calls > perDirectory*levels {
		t.Errorf("%d calls for %d directories", calls, levels)
	}
	if n := openFiles(t); n != before {
		t.Errorf("%d files are open, where %d were before", n, before)
	}
}

// A tree of directories that nobody may write to, deeper than the number of directories that RemoveAll keeps open,
// costs its owner no more than another tree.
func TestRemoveAllOfReadOnlyDirectories(t *testing.T) {
	const levels, perDirectory, nobody = 3 * maxDepth, 30, 65534
	dir := t.TempDir()
	top := filepath.Join(dir, "top")
	if err := errors.Join(os.Mkdir(top, 0o755), os.Chmod(dir, 0o777)); err != nil {
		t.Fatal(err)
	}
	deepTree(t, top, levels)
	isRoot := os.Geteuid() == 0
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		if err == nil && isRoot {
			err = os.Lchown(name, nobody, nobody)
		}
		if err == nil && d.IsDir() && isRoot {
			err = os.Chmod(name, 0o555)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	fd, calls := openTop(t, dir), 0
	Calling = func() { calls++ }
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		if isRoot {
			if _, err := unix.SetfsuidRetUid(nobody); err != nil {
				ended <- err
				return
			}
		}
		ended <- RemoveAll(fd, "top")
	}()
	err = <-ended
	Calling = nil
	if err != nil || calls > perDirectory*levels {
		t.Errorf("%d calls for %d directories, %v", calls, levels, err)
	}
	if _, err := os.Lstat(top); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

// Trees of any kinds and modes are removed, whatever their names. The names that RemoveAll itself makes are not
// special.
func TestRemoveAllOfEveryKind(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	top := filepath.Join(dir, "top")
	for _, p := range []string{outside, filepath.Join(top, "1", "locked", "below"), filepath.Join(top, "2", "3")} {
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	deepTree(t, filepath.Join(top, "1"), 3*maxDepth)
	deepTree(t, filepath.Join(top, "2"), 3*maxDepth)
	if err := os.WriteFile(filepath.Join(outside, "kept"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(top, "link")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(top, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(top, "1", "locked"), 0); err != nil {
		t.Fatal(err)
	}
	fd := openTop(t, dir)
	for _, name := range []string{"top", "missing"} {
		if err := RemoveAll(fd, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	names, err := Names(fd)
	if err != nil || strings.Join(names, " ") != "outside" {
		t.Errorf("left are %q (%v)", names, err)
	}
	if _, err := os.Lstat(filepath.Join(outside, "kept")); err != nil {
		t.Error(err)
	}
}

// A mount point in a tree stays, with openat2 and without.
func TestRemoveAllStopsAtMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, without := range []bool{false, true} {
		t.Run("without openat2 "+strconv.FormatBool(without), func(t *testing.T) {
			was := NoOpenat2.Load()
			defer NoOpenat2.Store(was)
			NoOpenat2.Store(was || without)
			dir := t.TempDir()
			top := filepath.Join(dir, "top")
			mounted := filepath.Join(top, "a", "mounted")
			if err := os.MkdirAll(mounted, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", mounted, "tmpfs", 0, ""); err != nil {
				t.Skip(err)
			}
			defer func() { _ = unix.Unmount(mounted, unix.MNT_DETACH) }()
			if err := os.WriteFile(filepath.Join(mounted, "kept"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := RemoveAll(openTop(t, dir), "top"); !errors.Is(err, ErrMounted) {
				t.Errorf("error is %v", err)
			}
			if _, err := os.Lstat(filepath.Join(mounted, "kept")); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOpenBeneath(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("b", filepath.Join(dir, "a", "link")); err != nil {
		t.Fatal(err)
	}
	fd := openTop(t, dir)
	for _, without := range []bool{false, true} {
		was := NoOpenat2.Load()
		NoOpenat2.Store(was || without)
		before := openFiles(t)
		for path, ok := range map[string]bool{"a": true, "a/b": true, "a/link": false, "a/link/.": false, "a/missing/b": false, "..": false, "a/../../x": false} {
			n, err := OpenBeneath(fd, path, OpenDir, 0)
			if (err == nil) != ok {
				t.Errorf("%s, without openat2 %v: %v", path, without, err)
			}
			if err == nil {
				_ = unix.Close(n)
			}
		}
		if n := openFiles(t); n != before {
			t.Errorf("%d files are open, where %d were before", n, before)
		}
		NoOpenat2.Store(was)
	}
}
