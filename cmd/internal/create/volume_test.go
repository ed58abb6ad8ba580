package create

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// copyAs has a process of the test binary copy a directory into another: FROM:TO.
const copyAs = "TEST_COPY"

func TestMain(m *testing.M) {
	if from, to, ok := strings.Cut(os.Getenv(copyAs), ":"); ok {
		source, err := os.Open(from)
		if err != nil {
			panic(err)
		}
		target, err := os.Open(to)
		if err != nil {
			panic(err)
		}
		fmt.Println(copyFiles(context.Background(), source, target))
		_, _ = source.Close(), target.Close() // not before: the copy knows them by their numbers
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// What a new volume's files are not given is counted: an ordinary user gives nobody a file.
func TestCopyCountsWhatIsNotSet(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("/tmp", "volume-") // which any user can search
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	const user = 65534
	from, program := filepath.Join(dir, "from"), filepath.Join(dir, "test")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.Chmod(dir, 0o755), os.Mkdir(from, 0o755), os.WriteFile(filepath.Join(from, "file"), []byte("data"), 0o644),
		os.Chown(filepath.Join(from, "file"), 4711, 4711), os.WriteFile(program, b, 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for uid, want := range map[uint32]string{0: "map[] <nil>", user: "map[owners:1] <nil>"} {
		to := filepath.Join(dir, fmt.Sprint("to", uid))
		if err := os.Mkdir(to, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(to, int(uid), int(uid)); err != nil {
			t.Fatal(err)
		}
		c := exec.Command(program)
		c.Dir, c.Env = dir, append(os.Environ(), copyAs+"="+from+":"+to)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := c.CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("user %d: %q, %v, not %q", uid, got, err, want)
		}
		if b, err := os.ReadFile(filepath.Join(to, "file")); err != nil || string(b) != "data" {
			t.Errorf("user %d: %q, %v", uid, b, err)
		}
	}
}
