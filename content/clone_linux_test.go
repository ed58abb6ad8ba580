package content_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// btrfs mounts a file system that has reflinks.
func btrfs(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		require(t, "root", unix.EPERM)
	}
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	for _, c := range [][]string{{"truncate", "-s", "256M", image}, {"mkfs.btrfs", "-q", image}, {"mkdir", mnt}, {"mount", "-o", "loop", image, mnt}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			require(t, "btrfs", errors.New(strings.Join(c, " ")+": "+err.Error()+": "+string(out)))
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	return mnt
}

// used returns how many bytes of a file system are in use after everything has been written to disk.
func used(t *testing.T, dir string) int64 {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var st unix.Statfs_t
	if err := errors.Join(unix.Syncfs(int(d.Fd())), unix.Fstatfs(int(d.Fd()), &st)); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

func file(t *testing.T, s *content.Store, dgst digest.Digest) *content.File {
	t.Helper()
	f, err := s.File(dgst)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// same reports whether two stores have the same file for a blob.
func same(t *testing.T, a, b *content.Store, dgst digest.Digest) bool {
	t.Helper()
	fa, aerr := file(t, a, dgst).Stat()
	fb, berr := file(t, b, dgst).Stat()
	if err := errors.Join(aerr, berr); err != nil {
		t.Fatal(err)
	}
	return os.SameFile(fa, fb)
}

func TestAFileIsStoredAsAReflink(t *testing.T) {
	t.Parallel()
	dir := btrfs(t)
	b, dgst := random(t, 16<<20)
	name := filepath.Join(dir, "file")
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := used(t, dir)
	s := open(t, filepath.Join(dir, "store"))
	if got, err := content.WriteBlob(t.Context(), s, "ref", f, 0, ""); err != nil || got != dgst {
		t.Fatal(got, err)
	}
	other := open(t, filepath.Join(dir, "other"))
	if _, err := content.WriteBlob(t.Context(), other, "ref", file(t, s, dgst), int64(len(b)), dgst); err != nil {
		t.Fatal(err)
	}
	if same(t, s, other, dgst) {
		t.Error("where there are reflinks a hard link was made")
	}
	if n := used(t, dir) - before; n > int64(len(b))/4 {
		t.Errorf("two stores take %d bytes more for a file of %d", n, len(b))
	}
	// A later change of the file does not change the blob.
	if _, err := f.WriteAt([]byte("changed"), 0); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, dgst, b)
	wantBlob(t, other, dgst, b)

	// A file that is not read from its beginning, or has more bytes than expected, is copied.
	if _, err := f.Seek(10, 0); err != nil {
		t.Fatal(err)
	}
	if got, err := content.WriteBlob(t.Context(), s, "tail", f, 0, ""); err != nil || got != digest.FromBytes(b[10:]) {
		t.Errorf("from the middle: %s, %v", got, err)
	}
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := content.WriteBlob(t.Context(), s, "longer", f, 10, ""); !errdefs.IsDataLoss(err) {
		t.Errorf("longer than expected: %v", err)
	}
	if list, err := s.ListStatuses(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("left: %v, %v", list, err)
	}
}

func TestABlobOfAnotherStoreIsLinked(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "size=16m")
	from := open(t, filepath.Join(dir, "from"))
	b, dgst := random(t, 1<<20)
	put(t, from, b)
	name, err := from.Path(dgst)
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		prepare func() error
		linked  bool
	}{
		"ours":                       {func() error { return nil }, true},
		"writable":                   {func() error { return os.Chmod(name, 0o644) }, false},
		"with set-ID bits":           {func() error { return os.Chmod(name, 0o444|os.ModeSetuid) }, false},
		"another user's":             {func() error { return os.Chown(name, 1, -1) }, false},
		"in another's directory":     {func() error { return os.Chown(filepath.Dir(name), 1, -1) }, false},
		"in a directory of everyone": {func() error { return os.Chmod(filepath.Dir(name), 0o777) }, false},
	} {
		if err := c.prepare(); err != nil {
			t.Fatal(err)
		}
		to := open(t, filepath.Join(dir, what))
		if got, err := content.WriteBlob(t.Context(), to, "ref", file(t, from, dgst), 0, dgst); err != nil || got != dgst {
			t.Fatalf("%s: %s, %v", what, got, err)
		}
		wantBlob(t, to, dgst, b)
		if same(t, from, to, dgst) != c.linked {
			t.Errorf("%s: linked %t", what, !c.linked)
		}
		if err := errors.Join(os.Chown(name, 0, -1), os.Chown(filepath.Dir(name), 0, -1), os.Chmod(name, 0o444), os.Chmod(filepath.Dir(name), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	// The name is removed, and the blob of the other store stays.
	if err := open(t, filepath.Join(dir, "ours")).Delete(t.Context(), dgst); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, from, dgst, b)
}

// Operations on a writer that has linked a blob do not change that blob.
func TestALinkIsGivenUp(t *testing.T) {
	t.Parallel()
	dir := tmpfs(t, "size=16m")
	from, to := open(t, filepath.Join(dir, "from")), open(t, filepath.Join(dir, "to"))
	b, dgst := random(t, 1<<20)
	put(t, from, b)
	writer := func() *content.Writer {
		w, err := to.Writer(t.Context(), "ref", 0, "")
		if err != nil {
			t.Fatal(err)
		}
		if w.Offset() != 0 {
			t.Fatalf("%d bytes are left of a link that was given up", w.Offset())
		}
		if ok, err := w.CloneFrom(t.Context(), file(t, from, dgst)); err != nil || !ok || w.Offset() != int64(len(b)) || w.Digest() != dgst {
			t.Fatal(ok, err, w.Offset(), w.Digest())
		}
		return w
	}
	w := writer()
	if _, err := w.Write([]byte("more")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Write: %v", err)
	}
	if _, err := w.CloneFrom(t.Context(), file(t, from, dgst)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("CloneFrom, again: %v", err)
	}
	if err := w.Commit(t.Context(), 0, digest.FromString("other"), nil); !errdefs.IsDataLoss(err) {
		t.Errorf("Commit: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	w = writer()
	if err := w.Truncate(0); err != nil {
		t.Error(err)
	}
	if _, err := w.Write([]byte("other")); err != nil {
		t.Error(err)
	}
	if err := w.Commit(t.Context(), 5, "", nil); err != nil {
		t.Error(err)
	}
	wantBlob(t, to, digest.FromString("other"), []byte("other"))
	if err := writer().Abort(); err != nil {
		t.Error(err)
	}
	// The process was killed.
	w = writer()
	left := filepath.Join(filepath.Dir(dir), filepath.Base(dir), "to", "ingest")
	if links, err := filepath.Glob(filepath.Join(left, "*", "link")); err != nil || len(links) != 1 {
		t.Fatal(links, err)
	} else if err := errors.Join(os.Link(links[0], filepath.Join(dir, "aside")), w.Close(), os.MkdirAll(filepath.Dir(links[0]), 0o777), os.Link(filepath.Join(dir, "aside"), links[0])); err != nil {
		t.Fatal(err)
	}
	w = writer()
	if err := w.Commit(t.Context(), 0, dgst, map[string]string{"a": "b"}); err != nil {
		t.Error(err)
	}
	if !same(t, from, to, dgst) {
		t.Error("it is not linked")
	}
	wantBlob(t, from, dgst, b)
	if entries, err := os.ReadDir(left); err != nil || len(entries) != 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "aside")); err != nil || !bytes.Equal(got, b) {
		t.Errorf("the blob changed: %v", err)
	}
}
