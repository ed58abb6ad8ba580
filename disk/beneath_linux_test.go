package disk

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"distkit/disk/sys"
)

// Without openat2(2), in the kernel or because of a filter of system calls, the results are the same. The call is tried
// only once.
func TestWithoutOpenat2(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("strace"); err != nil {
		if slices.Contains(strings.Split(os.Getenv("TEST_REQUIRE"), ","), "strace") {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	if fd, ok := openBeneath(unix.AT_FDCWD, "."); ok { // or the machine does not have it
		_ = unix.Close(fd)
	}
	for name, inject := range map[string][]string{
		"there":  nil,
		"ENOSYS": {"-e", "inject=openat2:error=ENOSYS"},
		"EPERM":  {"-e", "inject=openat2:error=EPERM"},
	} {
		trace := filepath.Join(t.TempDir(), "trace")
		args := slices.Concat([]string{"-f", "-qq", "-o", trace, "-e", "trace=openat2", "-e", "signal=none"}, inject,
			[]string{os.Args[0], "-test.run=^(TestTree|TestTreeRefusesWhatIsNoFile)$", "-test.v"})
		out, err := exec.Command("strace", args...).CombinedOutput()
		if err != nil || strings.Count(string(out), "--- PASS") != 2 {
			t.Errorf("%s: %v\n%s", name, err, out)
			continue
		}
		b, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(b), "openat2("); inject != nil && n != 1 || inject == nil && n < 10 && !sys.NoOpenat2.Load() {
			t.Errorf("%s: it was called %d times", name, n)
		}
	}
}

// A directory is removed even if it is deeper than the number of files that a process may have open.
func TestTreeRemoveAllOfADeepOne(t *testing.T) {
	const levels = 500
	tree := Tree(t.TempDir())
	for _, name := range []string{"d", "d/f"} {
		if err := tree.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	at, err := sys.Open(tree.Path("d"), sys.OpenDir, 0)
	for range levels {
		next := -1
		if err == nil {
			err = sys.Mkdirat(at, "d", 0o755)
		}
		if err == nil {
			next, err = sys.Openat(at, "d", sys.OpenDir, 0)
		}
		_ = unix.Close(at)
		at = next
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(at)
	most := 0
	sys.Calling = func() {
		list, _ := os.ReadDir("/proc/self/fd")
		most = max(most, len(list))
	}
	err = tree.RemoveAll("d")
	sys.Calling = nil
	if err != nil || most == 0 || most > levels/2 {
		t.Errorf("%v, with %d files open", err, most)
	}
	if _, err := tree.Stat("d"); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}
