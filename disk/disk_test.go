package disk

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestReplace(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	for _, durable := range []bool{false, true} {
		if err := os.WriteFile(name+".new", []byte("torn, and longer than what comes"), 0o400); err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{"one", "another"} {
			if err := Replace(name, []byte(text), 0o640, durable); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(name); err != nil || string(b) != text {
				t.Errorf("%q, %v", b, err)
			}
		}
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// A file that can't be put in place leaves no temporary file.
	dir := filepath.Join(filepath.Dir(name), "dir")
	if err := MakeDir(filepath.Join(dir, "below")); err != nil {
		t.Fatal(err)
	}
	if err := Replace(dir, nil, 0o600, true); err == nil {
		t.Error("a directory was replaced")
	}
	if _, err := os.Lstat(dir + ".new"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left aside: %v", err)
	}
	if err := MakeDir(filepath.Join(name, "x")); err == nil {
		t.Error("a directory was made in a file")
	}
}

// A lock that was waited for is on the file that has the name when the wait ends.
func TestLockFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	old, err := LockFile(t.Context(), name, os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockFile(t.Context(), name, os.O_RDWR, 0, unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) || !errdefs.IsUnavailable(err) {
		t.Errorf("locked twice: %v", err)
	}
	got := make(chan *os.File)
	go func() {
		f, err := LockFile(t.Context(), name, os.O_RDWR, 0, unix.LOCK_EX)
		if err != nil {
			t.Error(err)
		}
		got <- f
	}()
	if err := Replace(name, []byte("new"), 0o600, false); err != nil {
		t.Fatal(err)
	}
	if Names(name, old) {
		t.Error("the name leads to what was replaced")
	}
	old.Close()
	f := <-got
	defer f.Close()
	if !Names(name, f) {
		t.Error("the lock is of what was replaced")
	}
	if _, err := LockFile(t.Context(), name+"-no", os.O_RDWR, 0, unix.LOCK_EX); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestLockContext(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	holder, err := LockFile(t.Context(), name, os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	waiter, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	told := false
	ctx = WithNotice(ctx, func(string) { told = true })
	if err := LockContext(ctx, waiter, unix.LOCK_EX); !errors.Is(err, context.DeadlineExceeded) || told {
		t.Fatal(err, told)
	}
	// A lock that comes too late is released.
	Unlock(holder)
	next, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := LockContext(t.Context(), next, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	next.Close()
	holder.Close()
}

// A long wait is reported, with the process that has the lock, and goes on.
func TestNotice(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	holder, err := LockFile(t.Context(), name, os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan string, 1)
	ctx := WithNotice(t.Context(), func(text string) { told <- text })
	got := make(chan error, 1)
	go func() {
		f, err := LockFile(ctx, name, os.O_RDWR, 0, unix.LOCK_EX)
		if err == nil {
			Release(f)
		}
		got <- err
	}()
	if text, want := <-told, "waiting for the lock of "+name+": "; !strings.HasPrefix(text, want) {
		t.Errorf("%q does not begin with %q", text, want)
	}
	Release(holder)
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestNoLocks(t *testing.T) {
	for _, errno := range []error{unix.ENOLCK, unix.ENOSYS, unix.EOPNOTSUPP} {
		err := lockFailed("/x/file", errno)
		if !errdefs.IsNotImplemented(err) || !errors.Is(err, errno) ||
			err.Error() != "the file system of /x/file has no locks that processes share (flock: "+errno.Error()+")" {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if err := lockFailed("/x/file", unix.EBADF); !errors.Is(err, fs.ErrPermission) || errdefs.IsNotImplemented(err) {
		t.Errorf("a file that is open for reading: %v", err)
	}
	for _, errno := range []error{nil, unix.EWOULDBLOCK, unix.EIO} {
		if err := lockFailed("/x/file", errno); err != errno {
			t.Errorf("%v: %v", errno, err)
		}
	}
}
