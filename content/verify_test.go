package content_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestVerify(t *testing.T) {
	s := newStore(t)
	b, dgst := random(t, 1<<20)
	if err := s.Verify(t.Context(), dgst); !errdefs.IsNotFound(err) {
		t.Errorf("a blob that is not there: %v", err)
	}
	put(t, s, b)
	if err := s.Verify(t.Context(), dgst); err != nil {
		t.Error(err)
	}
	if err := s.DeleteCorrupt(t.Context(), dgst); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete what is right: %v", err)
	}
	path, _ := s.Path(dgst)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	b[500_000] ^= 1
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), dgst); !errdefs.IsDataLoss(err) {
		t.Errorf("a blob with a bit flipped: %v", err)
	}
	if err := s.DeleteCorrupt(t.Context(), dgst); err != nil {
		t.Error(err)
	}
	if _, err := s.Path(dgst); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

func TestStrays(t *testing.T) {
	s := newStore(t)
	list := func() (all []string) {
		if err := s.Strays(t.Context(), func(path string) error { all = append(all, path); return nil }); err != nil {
			t.Fatal(err)
		}
		return all
	}
	if got := list(); len(got) > 0 {
		t.Errorf("in no store: %q", got)
	}
	dgst := put(t, s, []byte("x"))
	if _, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "1"}}); err != nil {
		t.Fatal(err)
	}
	if got := list(); len(got) > 0 {
		t.Errorf("in a store without any: %q", got)
	}
	want := []string{
		"blobs/" + dgst.Encoded(),
		"blobs/sha256/README",
		"blobs/sha256/dir/" + dgst.Encoded(),
		"labels/sha256/" + digest.FromString("none").Encoded(),
	}
	for _, path := range append(want, "blobs/sha256/.nfs000000000000000100000002", "labels/sha256/.nfs1") {
		path = filepath.Join(s.Root(), path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("{}"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := slices.Sorted(slices.Values(list())); !slices.Equal(got, want) {
		t.Errorf("strays are\n%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
