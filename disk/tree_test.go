package disk

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// hostileTree fills dir/ with files that must not be followed, waited for or written to, and returns what each name is.
func hostileTree(t *testing.T) (tree Tree, outside string, bad []string) {
	t.Helper()
	top, err := os.MkdirTemp("", "t") // a short path: it has to fit a socket's address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	outside = filepath.Join(top, "outside")
	root := filepath.Join(top, "root")
	for _, d := range []string{outside, filepath.Join(root, "dir", "real")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{filepath.Join(outside, "file"), filepath.Join(root, "dir", "file")} {
		if err := os.WriteFile(f, []byte("text"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"link":     filepath.Join(outside, "file"),
		"new":      filepath.Join(outside, "made"), // leads to a file that doesn't exist
		"self":     "self",
		"up":       "../..",
		"away":     outside,
		"slash":    "/",
		"sideways": "file",
	} {
		if err := os.Symlink(target, filepath.Join(root, "dir", name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(root, "dir", "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(root, "dir", "socket"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	bad = []string{"dir/link", "dir/new", "dir/self", "dir/up", "dir/sideways", "dir/slash", "dir/away", "dir/away/file", "dir/away/made", "dir/up/file",
		"dir/fifo", "dir/socket", "dir/real", "dir/file/x"}
	if unix.Mknod(filepath.Join(root, "dir", "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))) == nil {
		bad = append(bad, "dir/null")
	}
	return Tree(root), outside, bad
}

func TestTreeRefusesWhatIsNoFile(t *testing.T) {
	tree, outside, bad := hostileTree(t)
	for _, name := range bad {
		for what, f := range map[string]func() error{
			"Open":      func() error { _, err := tree.Open(name); return err },
			"create":    func() error { _, err := tree.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644); return err },
			"ReadFile":  func() error { _, err := tree.ReadFile(name, 100); return err },
			"WriteFile": func() error { return tree.WriteFile(name, []byte("evil"), 0o644) },
			"LockFile": func() error {
				_, err := tree.LockFile(t.Context(), name, os.O_RDWR|os.O_CREATE, 0o644, unix.LOCK_EX)
				return err
			},
		} {
			var pe *fs.PathError
			if err := f(); !errdefs.IsFailedPrecondition(err) || !errors.As(err, &pe) {
				t.Errorf("%s %s: %v", what, name, err)
			}
		}
	}
	for _, name := range []string{"dir/away", "dir/up", "dir/slash", "dir/self", "dir/file", "dir/away/sub"} {
		if _, err := tree.OpenDir(name); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("OpenDir %s: %v", name, err)
		}
		if err := tree.MakeDir(name); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("MakeDir %s: %v", name, err)
		}
	}
	for _, name := range []string{"dir/away/file", "dir/slash/tmp"} {
		for what, err := range map[string]error{
			"Remove": tree.Remove(name), "RemoveDir": tree.RemoveDir(name), "Rename": tree.Rename(name, "dir/y"), "Rename to": tree.Rename("dir/file", name),
			"Link": tree.Link("dir/file", name), "Replace": tree.Replace(name, nil, 0o644, true),
		} {
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("%s %s: %v", what, name, err)
			}
		}
	}
	for _, name := range []string{"", "..", "../outside/file", "/etc/passwd", "dir/../../outside/file"} {
		if _, err := tree.Open(name); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Open %q: %v", name, err)
		}
	}
	entries, err := os.ReadDir(outside)
	b, rerr := os.ReadFile(filepath.Join(outside, "file"))
	if err != nil || rerr != nil || len(entries) != 1 || string(b) != "text" {
		t.Errorf("outside changed: %v, %q, %v, %v", entries, b, err, rerr)
	}
}

func TestTree(t *testing.T) {
	tree := Tree(t.TempDir())
	old := unix.Umask(0o027)
	err := tree.MakeDir("a/b/c")
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := tree.Stat("a/b"); err != nil || !fi.IsDir() || fi.Mode().Perm() != 0o750 {
		t.Errorf("%v, %v", fi, err)
	}
	if err := tree.MakeDir("a/b/c"); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := tree.Replace("a/b/f", []byte("one"), 0o600, true); err != nil {
		t.Fatal(err)
	}
	if err := tree.WriteFile("a/b/f", []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := tree.ReadFile("a/b/f", 1); err != nil || string(b) != "1" {
		t.Errorf("%q, %v", b, err)
	}
	if err := tree.Link("a/b/f", "a/g"); err != nil {
		t.Error(err)
	}
	if err := tree.Link("a/b/f", "a/g"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("linked twice: %v", err)
	}
	if err := tree.Rename("a/g", "h"); err != nil {
		t.Error(err)
	}
	lock, err := tree.LockFile(t.Context(), "h", os.O_RDWR, 0, unix.LOCK_EX)
	if err != nil || !tree.Names("h", lock) || !tree.Names("a/b/f", lock) || tree.Names("a", lock) {
		t.Errorf("lock: %v", err)
	}
	lock.Close()
	if err := tree.Remove("h"); err != nil {
		t.Error(err)
	}
	if _, err := tree.Open("h"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed: %v", err)
	}
	if err := tree.RemoveDir("a/b/c"); err != nil {
		t.Error(err)
	}
	if err := os.Truncate(tree.Path("a/b/f"), 2<<30); err != nil {
		t.Fatal(err)
	}
	if _, err := tree.ReadFile("a/b/f", 1<<20); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("two gigabytes: %v", err)
	}
	// A path that the user gives may lead through links: those are the user's own.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(string(tree), link); err != nil {
		t.Fatal(err)
	}
	if _, err := Tree(link).Stat("a/b/f"); err != nil {
		t.Error(err)
	}
}

// Several processes may remove one directory at the same time.
func TestTreeRemoveAllAtOnce(t *testing.T) {
	tree := Tree(t.TempDir())
	for range 200 {
		for _, name := range []string{"d/a/b", "d/c"} {
			if err := os.MkdirAll(tree.Path(name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		errs := make(chan error, 4)
		for range cap(errs) {
			go func() { errs <- tree.RemoveAll("d") }()
		}
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
	}
}
