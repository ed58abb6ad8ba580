package layout

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestSplitPaths(t *testing.T) {
	for list, want := range map[string][]string{
		"":                      nil,
		":":                     nil,
		"a":                     {"a"},
		"/a:b":                  {"/a", "b"},
		"/a::b:":                {"/a", "b"},
		`"/a:b":c`:              {"/a:b", "c"},
		`c:"/a\"b\\\n\303\244"`: {"c", "/a\"b\\\nä"},
		`a"b":c`:                {`a"b"`, "c"},
	} {
		if got, err := splitPaths(list); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v, not %q", list, got, err, want)
		}
	}
	for _, list := range []string{`"a`, `"a"b`, `a:"\q"`} {
		if got, err := splitPaths(list); err == nil {
			t.Errorf("%s: %q", list, got)
		}
	}
}

func TestOpenAlternates(t *testing.T) {
	dir := t.TempDir()
	unknown := filepath.Join(dir, "unknown")
	if err := errors.Join(os.Mkdir(unknown, 0o777), os.WriteFile(filepath.Join(unknown, "oci-layout"), []byte(`{"imageLayoutVersion":"9"}`), 0o666)); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for list, class := range map[string]func(error) bool{
		"absent":                      func(err error) bool { return err == nil },
		"unknown":                     errdefs.IsFailedPrecondition,
		`"absent`:                     errdefs.IsInvalidArgument,
		strings.Repeat("absent:", 65): errdefs.IsInvalidArgument,
	} {
		t.Setenv(AlternatesEnv, list)
		if d, err := Open("root"); !class(err) {
			t.Errorf("%.40s: %v, %v", list, d, err)
		}
	}
	t.Setenv(AlternatesEnv, "relative:./x/..")
	d, err := Open("root")
	if err != nil || len(d.Alternates) != 2 || string(d.Alternates[0]) != filepath.Join(dir, "relative") || string(d.Alternates[1]) != dir {
		t.Errorf("%v, %v", d.Alternates, err)
	}
}

// Something that is not a regular file is not a blob, so the next store is tried. Any failure other than absence is an
// error.
func TestFindBlob(t *testing.T) {
	dir := t.TempDir()
	dgst := digest.FromString("x")
	for _, s := range []string{"own", "link", "right"} {
		if err := os.MkdirAll(filepath.Join(dir, s, "blobs/sha256"), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	right := filepath.Join(dir, "right", BlobName(dgst))
	if err := errors.Join(os.WriteFile(right, []byte("x"), 0o444), os.Symlink(right, filepath.Join(dir, "link", BlobName(dgst)))); err != nil {
		t.Fatal(err)
	}
	find := func() (string, error) {
		t.Helper()
		d, err := Open(filepath.Join(dir, "own"))
		if err != nil {
			t.Fatal(err)
		}
		tree, _, err := d.FindBlob(dgst)
		f, oerr := d.OpenBlob(dgst)
		if (err == nil) != (oerr == nil) {
			t.Errorf("FindBlob: %v; OpenBlob: %v", err, oerr)
		}
		if oerr == nil {
			if f.Name() != tree.Path(BlobName(dgst)) {
				t.Errorf("OpenBlob opened %s, FindBlob found it in %s", f.Name(), tree)
			}
			f.Close()
		}
		return string(tree), err
	}
	t.Setenv(AlternatesEnv, filepath.Join(dir, "link"))
	if tree, err := find(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a link: %s, %v", tree, err)
	}
	t.Setenv(AlternatesEnv, filepath.Join(dir, "link")+":"+filepath.Join(dir, "right"))
	if tree, err := find(); err != nil || filepath.Base(tree) != "right" {
		t.Errorf("%s, %v", tree, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "own", BlobName(dgst)), []byte("x"), 0o444); err != nil {
		t.Fatal(err)
	}
	if tree, err := find(); err != nil || filepath.Base(tree) != "own" {
		t.Errorf("%s, %v", tree, err)
	}
}
