package inject_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/testdata/faults/inject"
)

func TestMain(m *testing.M) {
	inject.Main()
	os.Exit(m.Run())
}

// Only the second of two writes fails. Calls on files outside the directory aren't counted.
func TestOneCallFails(t *testing.T) {
	if err := inject.Works(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	name := filepath.Join(dir, "out")
	run := func(f inject.Fault) (inject.Result, string) {
		t.Helper()
		c := exec.Command("dd", "if=/dev/zero", "of="+name, "bs=5", "count=3", "status=none")
		c.Env = append(os.Environ(), "LC_ALL=C")
		r, err := inject.Run(c, dir, f, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return r, string(b)
	}
	r, got := run(inject.Fault{})
	if r.Status != 0 || r.Calls["write"] != 3 || r.Failed != "" || len(got) != 15 {
		t.Errorf("without a fault: %+v, %q", r, got)
	}
	r, got = run(inject.Fault{Call: "write", N: 2, Error: syscall.ENOSPC})
	if r.Status != 1 || r.Failed == "" || !strings.Contains(r.Stderr, "No space left") || len(got) != 5 {
		t.Errorf("with one: %+v, %q", r, got)
	}
	if r, _ = run(inject.Fault{Call: "write", N: 4, Error: syscall.EIO}); r.Status != 0 || r.Failed != "" {
		t.Errorf("with one that never comes: %+v", r)
	}
}
