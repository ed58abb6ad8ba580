package remotes

import (
	"errors"
	"io"
	"path/filepath"
	"testing"

	"distkit/disk"
	ondisk "distkit/disk/layout"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// While an object is put into a store, no sweep runs there. For a layout of another tool, no file is created for that.
func TestLayoutPutHoldsAStore(t *testing.T) {
	for _, store := range []bool{true, false} {
		dir := filepath.Join(t.TempDir(), "layout")
		tree := disk.Tree(dir)
		if store {
			if err := tree.MakeDir(ondisk.Ingest); err != nil {
				t.Fatal(err)
			}
		}
		r, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if store { // a directory that has other files and no layout yet
			if err := (ondisk.Dir{Tree: tree, Name: "."}).Create("."); err != nil {
				t.Fatal(err)
			}
		}
		held := false
		look := readerFunc(func([]byte) (int, error) {
			f, err := tree.Open(ondisk.Hold)
			if err == nil {
				held = errors.Is(disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
				_ = f.Close()
			}
			return 0, io.EOF
		})
		if _, err := r.Push(t.Context(), digest.FromString("").String(), look); err != nil {
			t.Fatal(err)
		}
		if _, err := tree.Stat(ondisk.Hold); held != store || (err == nil) != store {
			t.Errorf("store %t: held %t, %v", store, held, err)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }
