package content

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// below makes a store with one labelled blob that is an hour old. Stores that are opened afterwards in the test have it
// as an alternate.
func below(t *testing.T, text string) (*Store, digest.Digest) {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "below"))
	if err != nil {
		t.Fatal(err)
	}
	dgst, err := WriteBlob(t.Context(), s, "ref", strings.NewReader(text), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), Info{Digest: dgst, Labels: map[string]string{"a": "b"}}); err != nil {
		t.Fatal(err)
	}
	hour := time.Now().Add(-time.Hour)
	if err := os.Chtimes(s.Tree.Path(layout.BlobName(dgst)), hour, hour); err != nil {
		t.Fatal(err)
	}
	t.Setenv(layout.AlternatesEnv, s.Root())
	return s, dgst
}

func TestBlobsOfAlternatesAreReadAndNotWritten(t *testing.T) {
	ctx := t.Context()
	lower, dgst := below(t, "hello")
	was, err := lower.Info(ctx, dgst)
	if err != nil {
		t.Fatal(err)
	}
	s, err := Open(filepath.Join(t.TempDir(), "above"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := s.File(dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || string(b) != "hello" || f.Size() != 5 {
		t.Errorf("%q, %v", b, err)
	}
	if info, err := s.Info(ctx, dgst); err != nil || info.Size != 5 || info.Labels["a"] != "b" {
		t.Errorf("%v, %v", info, err)
	}
	if path, err := s.Path(dgst); err != nil || path != lower.Tree.Path(layout.BlobName(dgst)) {
		t.Errorf("%s, %v", path, err)
	}
	if err := s.Verify(ctx, dgst); err != nil {
		t.Error(err)
	}
	if err := s.Freshen(t.Context(), dgst); err != nil {
		t.Error(err)
	}
	if _, err := s.Writer(ctx, "ref", 5, dgst); !errdefs.IsAlreadyExists(err) {
		t.Errorf("an ingest of it: %v", err)
	}
	_, err = s.Update(ctx, Info{Digest: dgst})
	for what, err := range map[string]error{"delete": s.Delete(ctx, dgst), "delete corrupt": s.DeleteCorrupt(ctx, dgst), "label": err} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "alternate") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := os.Lstat(s.Root()); !os.IsNotExist(err) {
		t.Errorf("a store that borrows all it needs was made: %v", err)
	}
	if is, err := lower.Info(ctx, dgst); err != nil || !is.CreatedAt.Equal(was.CreatedAt) || !is.UpdatedAt.Equal(was.UpdatedAt) {
		t.Errorf("the blob below was touched: %v, %v; it was %v", is, err, was)
	}

	// Bytes without an expected digest are dropped when it turns out that the blob exists.
	if got, err := WriteBlob(ctx, s, "ref", strings.NewReader("hello"), 0, ""); err != nil || got != dgst {
		t.Errorf("%s, %v", got, err)
	}
	if all := digests(t, s); len(all) != 0 {
		t.Errorf("the store has %v of its own", all)
	}
	if left, err := s.ListStatuses(ctx); err != nil || len(left) != 0 {
		t.Errorf("ingests are left: %v, %v", left, err)
	}

	// A blob whose copy in the alternate has the wrong size is stored.
	path := lower.Tree.Path(layout.BlobName(dgst))
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 3); err != nil {
		t.Fatal(err)
	}
	if _, err := WriteBlob(ctx, s, "ref", strings.NewReader("hello"), 5, dgst); err != nil {
		t.Error(err)
	}
	if err := s.Verify(ctx, dgst); err != nil {
		t.Error(err)
	}
	if all := digests(t, s); len(all) != 1 {
		t.Errorf("the store has %v of its own", all)
	}
}

func digests(t *testing.T, s *Store) (all []digest.Digest) {
	t.Helper()
	if err := s.Digests(context.Background(), func(d digest.Digest) error { all = append(all, d); return nil }); err != nil {
		t.Fatal(err)
	}
	return all
}

// A damaged file of labels does not hinder a caller that replaces all labels.
func TestReplacingLabelsMendsTheirFile(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	dgst, err := WriteBlob(t.Context(), s, "ref", strings.NewReader("x"), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{"a": "b"}
	if _, err := s.Update(t.Context(), Info{Digest: dgst, Labels: labels}); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.Tree.Path(labelName(dgst)), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), Info{Digest: dgst, Labels: labels}, "labels.a"); !errdefs.IsDataLoss(err) {
		t.Errorf("one label of a damaged file: %v", err)
	}
	if info, err := s.Update(t.Context(), Info{Digest: dgst, Labels: labels}, "labels"); err != nil || info.Labels["a"] != "b" {
		t.Errorf("%v, %v", info, err)
	}
}
