package overlayfs_test

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"distkit/snapshot"
	"distkit/snapshot/overlayfs"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// settling returns a layer, its parent, and a directory outside of both.
func settling(t *testing.T) (tree snapshot.Tree, lower, outside string) {
	t.Helper()
	dir := t.TempDir()
	tree = snapshot.Tree{Dir: filepath.Join(dir, "2"), Kind: snapshot.Active, Parents: []string{filepath.Join(dir, "1")}}
	lower, outside = tree.ParentFS(), filepath.Join(dir, "outside")
	for _, d := range []string{tree.FS(), lower, outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return tree, lower, outside
}

func notes(fields ...string) *strings.Reader {
	return strings.NewReader(strings.Join(fields, "\x00") + "\x00")
}

func TestSettleRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		notes string
		class func(error) bool
	}{
		"cut short":      {"directory\x00a", errdefs.IsInvalidArgument},
		"two fields":     {"directory\x00a\x00", errdefs.IsInvalidArgument},
		"text":           {"what is this?\n", errdefs.IsInvalidArgument},
		"up":             {"directory\x00../x\x00\x00", errdefs.IsInvalidArgument},
		"absolute":       {"whiteout\x00/etc\x00\x00", errdefs.IsInvalidArgument},
		"dots":           {"directory\x00a/./b\x00\x00", errdefs.IsInvalidArgument},
		"empty":          {"directory\x00\x00\x00", errdefs.IsInvalidArgument},
		"link up":        {"link\x00a\x00b/../../x\x00", errdefs.IsInvalidArgument},
		"long":           {"directory\x00" + strings.Repeat("a", 70<<10) + "\x00\x00", errdefs.IsInvalidArgument},
		"unknown word":   {"later\x00a\x00b\x00", errdefs.IsNotImplemented},
		"again":          {"directory\x00.\x00\x00again\x00a\x00why\x00", errdefs.IsFailedPrecondition},
		"link to none":   {"link\x00a\x00none\x00", errdefs.IsFailedPrecondition},
		"link to a dir":  {"link\x00a\x00dir\x00", errdefs.IsFailedPrecondition},
		"a file below":   {"directory\x00file\x00\x00", errdefs.IsFailedPrecondition},
		"a link below":   {"directory\x00lib\x00\x00named\x00lib\x00\x00", errdefs.IsFailedPrecondition},
		"link by a link": {"link\x00a\x00lib/x\x00", errdefs.IsFailedPrecondition},
	} {
		tree, lower, _ := settling(t)
		for _, err := range []error{
			os.Mkdir(filepath.Join(lower, "dir"), 0o755), os.WriteFile(filepath.Join(lower, "file"), nil, 0o644),
			os.WriteFile(filepath.Join(lower, "dir/x"), nil, 0o644), os.Symlink("dir", filepath.Join(lower, "lib")),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := (overlayfs.Driver{}).Settle(t.Context(), tree, strings.NewReader(c.notes)); !c.class(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A layer of a few kilobytes can have gigabytes of unresolved notes. Only a little of them is read.
func TestSettleKeepsLittle(t *testing.T) {
	tree, _, _ := settling(t)
	long := strings.Repeat("d/", 1999) + "d"
	for name, one := range map[string]string{"many": "directory\x00d\x00\x00", "long": "link\x00" + long + "\x00" + long + "\x00"} {
		r := &endless{one: one}
		err := overlayfs.Driver{}.Settle(t.Context(), tree, r)
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "apply the layer again") || r.read > 32<<20 {
			t.Errorf("%s: after %d bytes: %v", name, r.read, err)
		}
	}
}

// endless repeats its content, up to a gigabyte.
type endless struct {
	one  string
	read int
}

func (e *endless) Read(b []byte) (int, error) {
	if e.read > 1<<30 {
		return 0, io.EOF
	}
	n := copy(b, e.one[e.read%len(e.one):])
	e.read += n
	return n, nil
}

// Symbolic links in the layer or its parents do not lead outside.
func TestSettleStaysInside(t *testing.T) {
	snapshottest.Root(t)
	tree, lower, outside := settling(t)
	at := func(names ...string) string { return filepath.Join(names...) }
	for _, err := range []error{
		os.Symlink(outside, at(tree.FS(), "evil")),
		os.Symlink(outside, at(lower, "below")),
		os.WriteFile(at(lower, "file"), []byte("of the parent"), 0o600),
		os.Mkdir(at(outside, "dir"), 0o700),
		os.WriteFile(at(outside, "secret"), []byte("secret"), 0o600),
		unix.Mknod(at(outside, "whiteout"), unix.S_IFCHR, 0),
		unix.Mknod(at(outside, "socket"), unix.S_IFSOCK|0o600, 0),
		unix.Mknod(at(tree.FS(), "link"), unix.S_IFSOCK|0o600, 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	err := overlayfs.Driver{}.Settle(t.Context(), tree, notes(
		"directory", "evil/dir", "", "whiteout", "evil/whiteout", "", "link", "evil/socket", "file", "link", "link", "file"))
	if err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(at(tree.FS(), "link")); err != nil || string(b) != "of the parent" {
		t.Errorf("the link within holds %q: %v", b, err)
	}
	for name, mode := range map[string]os.FileMode{
		"dir": os.ModeDir | 0o700, "whiteout": os.ModeDevice | os.ModeCharDevice, "socket": os.ModeSocket | 0o600,
	} {
		if fi, err := os.Lstat(at(outside, name)); err != nil || fi.Mode() != mode {
			t.Errorf("outside %s is %v: %v", name, fi, err)
		}
	}
	tree, lower, outside = settling(t)
	if err := os.Symlink(outside, at(lower, "below")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at(outside, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(at(tree.FS(), "link"), unix.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
	if err := (overlayfs.Driver{}).Settle(t.Context(), tree, notes("link", "link", "below/secret")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a link through a symbolic link below: %v", err)
	}
}
