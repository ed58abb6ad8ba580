package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

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
	// What can't be put in place leaves nothing aside.
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

// A lock that was waited for is of what the name leads to by then.
func TestLockFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	old, err := LockFile(name, os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockFile(name, os.O_RDWR, 0, unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("locked twice: %v", err)
	}
	got := make(chan *os.File)
	go func() {
		f, err := LockFile(name, os.O_RDWR, 0, unix.LOCK_EX)
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
	if _, err := LockFile(name+"-no", os.O_RDWR, 0, unix.LOCK_EX); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func TestLockContext(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	holder, err := LockFile(name, os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	waiter, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := LockContext(ctx, waiter, unix.LOCK_EX); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	// What comes too late is given back.
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
