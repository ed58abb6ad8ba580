package layout

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
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
		size, exists, err := d.PutBlob(t.Context(), dgst, expected, func(w io.Writer) error {
			written = true
			_, err := io.WriteString(w, text)
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
	if _, _, err := d.PutBlob(t.Context(), digest.FromString("other"), -1, func(w io.Writer) error { return failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	if all, err := os.ReadDir(filepath.Dir(name)); err != nil || len(all) != 1 {
		t.Errorf("there are %q, %v", all, err)
	}
}
