package layout

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func TestPutBlob(t *testing.T) {
	t.Parallel()
	d, err := Open(filepath.Join(t.TempDir(), "layout"))
	if err != nil {
		t.Fatal(err)
	}
	const text = "text"
	dgst := digest.FromString(text)
	name := d.Tree.Path(BlobName(dgst))
	put := func(what string, expected int64, stored bool) {
		t.Helper()
		written := false
		size, exists, err := d.PutBlob(t.Context(), dgst, expected, 0, func(f *os.File) error {
			written = true
			_, err := f.WriteString(text)
			return err
		})
		if err != nil || size != 4 || exists == stored || written != stored {
			t.Errorf("%s: %d bytes, exists %t, written %t, %v", what, size, exists, written, err)
		}
		b, err := os.ReadFile(name)
		fi, ferr := os.Stat(name)
		if err := errors.Join(err, ferr); err != nil {
			t.Fatal(err)
		}
		if string(b) != text || fi.Mode() != 0o444 || time.Since(fi.ModTime()) > time.Hour {
			t.Errorf("%s: it is %q, %v, of %v", what, b, fi.Mode(), fi.ModTime())
		}
	}
	put("new", -1, true)
	old := time.Now().Add(-48 * time.Hour)
	for _, size := range []int64{-1, 4} {
		if err := os.Chtimes(name, old, old); err != nil {
			t.Fatal(err)
		}
		put("there", size, false)
	}
	for _, damaged := range []int64{0, 3, 5} {
		if err := errors.Join(os.Chmod(name, 0o644), os.Truncate(name, damaged)); err != nil {
			t.Fatal(err)
		}
		put("damaged", 4, true)
	}
	failed := errors.New("failed")
	if _, _, err := d.PutBlob(t.Context(), digest.FromString("other"), -1, 0, func(*os.File) error { return failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	if all, err := os.ReadDir(filepath.Dir(name)); err != nil || len(all) != 1 {
		t.Errorf("there are %q, %v", all, err)
	}
}

// A put that is interrupted leaves a part, and the next put continues it.
func TestPutBlobInParts(t *testing.T) {
	t.Parallel()
	d, err := Open(filepath.Join(t.TempDir(), "layout"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Repeat("0123456789abcdef", 16<<10)
	dgst := digest.FromString(text)
	half, n := int64(len(text)/2), int64(len(text))
	cut := errclass.Errorf(errdefs.ErrAborted, "the link broke")
	put := func(begin, end int64, failure error) error {
		_, _, err := d.PutBlob(t.Context(), dgst, n, begin, func(f *os.File) error {
			if at, err := f.Seek(0, io.SeekCurrent); at != begin || err != nil {
				t.Errorf("it writes at %d, not %d, %v", at, begin, err)
			}
			if _, err := f.WriteString(text[begin:end]); err != nil {
				return err
			}
			if d.PartSize(t.Context(), dgst) != 0 {
				t.Error("a part that is written to is offered")
			}
			return failure
		})
		return err
	}
	has := func(what string, want int64) {
		t.Helper()
		if size := d.PartSize(t.Context(), dgst); size != want {
			t.Errorf("%s: a part of %d bytes, not %d", what, size, want)
		}
	}
	has("nothing was put", 0)
	if err := put(half, n, nil); !errdefs.IsAborted(err) {
		t.Errorf("a rest without a beginning: %v", err)
	}
	if err := put(0, 1000, cut); !errdefs.IsAborted(err) {
		t.Error(err)
	}
	has("a short put was cut", 0)
	if err := put(0, half, errors.New("the disk is full")); err == nil {
		t.Error("a put that fails succeeds")
	}
	has("a put has failed", 0)
	if err := put(0, half, cut); !errdefs.IsAborted(err) {
		t.Error(err)
	}
	has("a put was cut", half)
	if err := put(half+1, n, nil); !errdefs.IsAborted(err) {
		t.Errorf("a rest that begins later: %v", err)
	}
	has("it did not fit", half)
	if err := put(half-10, n-10, cut); !errdefs.IsAborted(err) {
		t.Error(err)
	}
	has("the rest was cut", n-10)
	// Entries with other names, and those that are not files, are left alone.
	part := d.Tree.Path(partName(dgst))
	other := filepath.Join(t.TempDir(), "other")
	if err := os.Link(part, other); err != nil {
		t.Fatal(err)
	}
	has("it has another name", 0)
	if err := put(0, half, cut); !errdefs.IsAborted(err) {
		t.Error(err)
	}
	if b, err := os.ReadFile(other); err != nil || int64(len(b)) != n-10 {
		t.Errorf("another file was changed: %d bytes, %v", len(b), err)
	}
	for what, replace := range map[string]func() error{
		"a symbolic link": func() error { return os.Symlink(other, part) },
		"a directory":     func() error { return os.Mkdir(part, 0o700) },
		"a FIFO":          func() error { return unix.Mkfifo(part, 0o600) },
	} {
		if err := errors.Join(os.Remove(part), replace()); err != nil {
			t.Fatal(err)
		}
		has(what, 0)
		if err := put(0, n, cut); !errdefs.IsAborted(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := os.Remove(part); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(other, part), put(n-10, n, nil)); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(d.Tree.Path(BlobName(dgst))); err != nil || string(b) != text {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if all, err := os.ReadDir(filepath.Dir(part)); err != nil || len(all) != 1 {
		t.Errorf("there are %q, %v", all, err)
	}
}
