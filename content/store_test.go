package content_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func open(t *testing.T, root string) *content.Store {
	t.Helper()
	s, err := content.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newStore(t *testing.T) *content.Store {
	t.Helper()
	return open(t, filepath.Join(t.TempDir(), "store"))
}

func put(t *testing.T, s *content.Store, b []byte) digest.Digest {
	t.Helper()
	dgst, err := content.WriteBlob(t.Context(), s, "put", bytes.NewReader(b), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	return dgst
}

func random(t *testing.T, n int) ([]byte, digest.Digest) {
	t.Helper()
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b, digest.FromBytes(b)
}

func wantBlob(t *testing.T, s *content.Store, dgst digest.Digest, want []byte) {
	t.Helper()
	r, err := s.File(dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("blob %s: %d bytes, %v; want %d", dgst, len(got), err, len(want))
	}
}

// files lists all files of a tree, so that a test can check that there are no others.
func files(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if rel, _ := filepath.Rel(root, path); rel != "." {
			all = append(all, rel)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return all
}

func TestReadingCreatesNothing(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "store")
	s := open(t, root)
	absent := digest.FromString("absent")
	ctx := t.Context()
	if _, err := s.Path(absent); !errdefs.IsNotFound(err) {
		t.Errorf("Path: %v", err)
	}
	if _, err := s.Info(ctx, absent); !errdefs.IsNotFound(err) {
		t.Errorf("Info: %v", err)
	}
	if _, err := s.File(absent); !errdefs.IsNotFound(err) {
		t.Errorf("File: %v", err)
	}
	if err := s.Delete(ctx, absent); !errdefs.IsNotFound(err) {
		t.Errorf("Delete: %v", err)
	}
	if _, err := s.Update(ctx, content.Info{Digest: absent}); !errdefs.IsNotFound(err) {
		t.Errorf("Update: %v", err)
	}
	if _, err := s.Status(ctx, "ref"); !errdefs.IsNotFound(err) {
		t.Errorf("Status: %v", err)
	}
	if err := s.Abort(ctx, "ref"); !errdefs.IsNotFound(err) {
		t.Errorf("Abort: %v", err)
	}
	if list, err := s.ListStatuses(ctx); err != nil || len(list) != 0 {
		t.Errorf("ListStatuses: %v, %v", list, err)
	}
	if err := s.Walk(ctx, func(content.Info) error { return errors.New("called") }); err != nil {
		t.Errorf("Walk: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(root)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was created: %v", files(t, filepath.Dir(root)))
	}
}

func TestLayoutVersion(t *testing.T) {
	for text, ok := range map[string]bool{
		`{"imageLayoutVersion":"1.0.0"}`:       true,
		`{"imageLayoutVersion":"1.0.0","x":1}`: true,
		`{"imageLayoutVersion":"2.0.0"}`:       false,
		`{}`:                                   false,
		`nonsense`:                             false,
		``:                                     false,
	} {
		root := t.TempDir()
		if err := os.WriteFile(filepath.Join(root, "oci-layout"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := content.Open(root)
		if ok && err != nil || !ok && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("oci-layout %q: %v", text, err)
		}
	}
}

func TestFirstWriteMakesAnImageLayout(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "store")
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			s, err := content.Open(root)
			if err == nil {
				err = s.Init()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got, want := files(t, root), []string{"blobs", "index.json", "ingest", "oci-layout"}; !slices.Equal(got, want) {
		t.Errorf("files are %q, not %q", got, want)
	}
	var index struct {
		SchemaVersion int
		Manifests     []any
	}
	b, err := os.ReadFile(filepath.Join(root, "index.json"))
	if err != nil || json.Unmarshal(b, &index) != nil || index.SchemaVersion != 2 || index.Manifests == nil {
		t.Errorf("index.json is %q, %v", b, err)
	}
}

func TestInitKeepsNames(t *testing.T) {
	root := t.TempDir()
	names := []byte(`{"schemaVersion":2,"manifests":[{"digest":"x"}]}`)
	if err := os.WriteFile(filepath.Join(root, "index.json"), names, 0o644); err != nil {
		t.Fatal(err)
	}
	put(t, open(t, root), []byte("x"))
	if b, _ := os.ReadFile(filepath.Join(root, "index.json")); !bytes.Equal(b, names) {
		t.Errorf("index.json became %q", b)
	}
}

func TestBlobsOfBothAlgorithms(t *testing.T) {
	s := newStore(t)
	b, sum256 := random(t, 3<<20)
	h := sha512.Sum512(b)
	sum512 := digest.Digest("sha512:" + hex.EncodeToString(h[:]))
	for _, dgst := range []digest.Digest{sum256, sum512} {
		before := time.Now()
		if got, err := content.WriteBlob(t.Context(), s, "x", bytes.NewReader(b), int64(len(b)), dgst); err != nil || got != dgst {
			t.Fatalf("WriteBlob: %s, %v", got, err)
		}
		after := time.Now()
		wantBlob(t, s, dgst, b)
		info, err := s.Info(t.Context(), dgst)
		if err != nil || info.Size != int64(len(b)) || info.CreatedAt.Before(before) || info.CreatedAt.After(after) || !info.UpdatedAt.Equal(info.CreatedAt) {
			t.Errorf("Info is %+v, %v; stored between %v and %v", info, err, before, after)
		}
		path, err := s.Path(dgst)
		if err != nil || path != filepath.Join(s.Root(), "blobs", dgst.Algorithm().String(), dgst.Encoded()) {
			t.Errorf("Path is %s, %v", path, err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o444 {
			t.Errorf("mode is %v, %v", fi.Mode(), err)
		}
	}
	if got := files(t, filepath.Join(s.Root(), "ingest")); len(got) > 0 {
		t.Errorf("left in ingest: %q", got)
	}
}

func TestCommitUnderAnotherAlgorithm(t *testing.T) {
	s := newStore(t)
	b, _ := random(t, 1<<20)
	h := sha512.Sum512(b)
	dgst := digest.Digest("sha512:" + hex.EncodeToString(h[:]))
	w, err := s.Writer(t.Context(), "ref", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(t.Context(), 0, dgst, nil); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, dgst, b)
}

func TestDigestsThatCanNotBe(t *testing.T) {
	if err := content.Validate(""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no digest: %v", err)
	}
	hex64 := strings.Repeat("a", 64)
	for dgst, is := range map[string]func(error) bool{
		"sha256":                            errdefs.IsInvalidArgument,
		"sha256:":                           errdefs.IsInvalidArgument,
		"sha256:abc":                        errdefs.IsInvalidArgument,
		"sha256:" + strings.ToUpper(hex64):  errdefs.IsInvalidArgument,
		"sha256:../../../../../etc/passwd":  errdefs.IsInvalidArgument,
		"../sha256:" + hex64:                errdefs.IsInvalidArgument,
		"sha256:" + hex64[:63] + "/":        errdefs.IsInvalidArgument,
		"sha512:" + hex64:                   errdefs.IsInvalidArgument,
		hex64:                               errdefs.IsInvalidArgument,
		"sha384:" + strings.Repeat("a", 96): errdefs.IsNotImplemented,
		"md5:" + strings.Repeat("a", 32):    errdefs.IsNotImplemented,
	} {
		s := newStore(t)
		for _, err := range []error{
			content.Validate(digest.Digest(dgst)),
			func() error { _, err := s.Path(digest.Digest(dgst)); return err }(),
			s.Delete(t.Context(), digest.Digest(dgst)),
			func() error { _, err := s.Writer(t.Context(), "ref", 0, digest.Digest(dgst)); return err }(),
		} {
			if !is(err) {
				t.Errorf("digest %q: %v", dgst, err)
			}
		}
	}
}

func TestWalkPassesOverWhatIsNoBlob(t *testing.T) {
	s := newStore(t)
	want := []digest.Digest{put(t, s, []byte("a")), put(t, s, []byte("b"))}
	dir := filepath.Join(s.Root(), "blobs", "sha256")
	for _, name := range []string{"README", strings.Repeat("A", 64), strings.Repeat("a", 63), ".tmp"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{filepath.Join(dir, strings.Repeat("b", 64)), filepath.Join(s.Root(), "blobs", "other")} {
		if err := os.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	before := files(t, s.Root())
	var walked, listed []digest.Digest
	if err := s.Walk(t.Context(), func(i content.Info) error { walked = append(walked, i.Digest); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Digests(t.Context(), func(d digest.Digest) error { listed = append(listed, d); return nil }); err != nil {
		t.Fatal(err)
	}
	for _, got := range [][]digest.Digest{walked, listed} {
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("found %v, not %v", got, want)
		}
	}
	if after := files(t, s.Root()); !slices.Equal(before, after) {
		t.Errorf("walking changed %q to %q", before, after)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Digests(ctx, func(digest.Digest) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("with a cancelled context: %v", err)
	}
}

func TestDelete(t *testing.T) {
	s := newStore(t)
	dgst := put(t, s, []byte("x"))
	if _, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "1"}}); err != nil {
		t.Fatal(err)
	}
	r, err := s.File(dgst)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := s.Delete(t.Context(), dgst); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), dgst); !errdefs.IsNotFound(err) {
		t.Errorf("a second time: %v", err)
	}
	b := make([]byte, 1)
	if _, err := r.ReadAt(b, 0); err != nil || string(b) != "x" {
		t.Errorf("the open reader reads %q, %v", b, err)
	}
	put(t, s, []byte("x"))
	if info, err := s.Info(t.Context(), dgst); err != nil || len(info.Labels) > 0 {
		t.Errorf("stored again: %+v, %v", info, err)
	}
}

// deleteUnused deletes one blob in the way a sweep does.
func deleteUnused(s *content.Store, dgst digest.Digest, before, labelled time.Time) error {
	u := s.Unused(before, labelled)
	defer u.Close()
	return u.Delete(dgst)
}

func TestUnused(t *testing.T) {
	s := newStore(t)
	dgst := put(t, s, []byte("x"))
	old := time.Now().Add(-time.Hour)
	if err := deleteUnused(s, dgst, old, time.Now().Add(time.Hour)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a blob that is new: %v", err)
	}
	path, _ := s.Path(dgst)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if err := s.Freshen(t.Context(), dgst); err != nil {
		t.Fatal(err)
	}
	if err := deleteUnused(s, dgst, time.Now().Add(-time.Minute), time.Now().Add(time.Hour)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a blob that was freshened: %v", err)
	}
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if err := deleteUnused(s, dgst, time.Now().Add(-time.Minute), time.Now().Add(time.Hour)); err != nil {
		t.Error(err)
	}
}

func TestLabels(t *testing.T) {
	s := newStore(t)
	w, err := s.Writer(t.Context(), "ref", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	_, _ = w.Write([]byte("x"))
	if err := w.Commit(t.Context(), 0, "", map[string]string{"at": "commit"}); err != nil {
		t.Fatal(err)
	}
	dgst := digest.FromString("x")
	first, err := s.Info(t.Context(), dgst)
	if err != nil || first.Labels["at"] != "commit" {
		t.Fatalf("after commit: %+v, %v", first, err)
	}
	for _, c := range []struct {
		labels map[string]string
		fields []string
		want   map[string]string
	}{
		{map[string]string{"a": "1", "b": "2"}, nil, map[string]string{"a": "1", "b": "2"}},
		{map[string]string{"a": "3", "b": "4"}, []string{"labels.a"}, map[string]string{"a": "3", "b": "2"}},
		{map[string]string{"a": ""}, []string{"labels.a"}, map[string]string{"b": "2"}},
		{nil, []string{"labels.b"}, map[string]string{}},
		{map[string]string{"c": "1", "d": ""}, []string{"labels"}, map[string]string{"c": "1"}},
	} {
		before := time.Now()
		info, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: c.labels}, c.fields...)
		if err != nil || !maps.Equal(info.Labels, c.want) {
			t.Errorf("Update(%v, %v): %v, %v; want %v", c.labels, c.fields, info.Labels, err, c.want)
		}
		if !info.CreatedAt.Equal(first.CreatedAt) || info.UpdatedAt.Before(before) || info.UpdatedAt.After(time.Now()) {
			t.Errorf("Update: created %v, updated %v", info.CreatedAt, info.UpdatedAt)
		}
	}
	for _, c := range []content.Info{
		{Digest: dgst, Labels: map[string]string{"": "x"}},
		{Digest: dgst, Labels: map[string]string{"k": strings.Repeat("v", 4096)}},
	} {
		if _, err := s.Update(t.Context(), c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("labels that can't be: %v", err)
		}
	}
	if _, err := s.Update(t.Context(), content.Info{Digest: dgst}, "size"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a field that can't be changed: %v", err)
	}
}

func TestLabelsByManyLoseNone(t *testing.T) {
	s := newStore(t)
	dgst := put(t, s, []byte("x"))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			key := string(rune('a' + i))
			if _, err := s.Update(context.Background(), content.Info{Digest: dgst, Labels: map[string]string{key: "1"}}, "labels."+key); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if info, err := s.Info(t.Context(), dgst); err != nil || len(info.Labels) != 20 {
		t.Errorf("%v, %v", info.Labels, err)
	}
}

func TestFoundBlobsAreFreshened(t *testing.T) {
	s := newStore(t)
	dgst := put(t, s, []byte("x"))
	path, _ := s.Path(dgst)
	old := time.Now().Add(-48 * time.Hour)
	for name, found := range map[string]func() error{
		"Writer": func() error {
			_, err := s.Writer(t.Context(), "ref", 0, dgst)
			return err
		},
		"Commit": func() error {
			w, err := s.Writer(t.Context(), "ref", 0, "")
			if err != nil {
				return err
			}
			defer w.Close()
			_, _ = w.Write([]byte("x"))
			return w.Commit(t.Context(), 0, "", nil)
		},
	} {
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
		if err := found(); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%s: %v", name, err)
		}
		if info, err := s.Info(t.Context(), dgst); err != nil || time.Since(info.CreatedAt) > time.Hour {
			t.Errorf("%s left it as of %v, %v", name, info.CreatedAt, err)
		}
	}
	if _, err := s.Writer(t.Context(), "ref", 7, dgst); !errdefs.IsDataLoss(err) || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with another size: %v", err)
	}
	if got := files(t, filepath.Join(s.Root(), "ingest")); len(got) > 0 {
		t.Errorf("left in ingest: %q", got)
	}
}

// A blob whose size shows that it is damaged is stored again, with or without an expected digest. If the stored blob is
// correct, the expected size is wrong, and nothing is stored.
func TestADamagedBlobIsReplaced(t *testing.T) {
	t.Parallel()
	b, dgst := random(t, 1000)
	empty := digest.FromString("")
	for what, c := range map[string]struct {
		dgst, expected digest.Digest
		b              []byte
		size, damaged  int64
	}{
		"at the commit":                 {dgst, "", b, 0, 10},
		"at the commit, longer":         {dgst, "", b, 0, 2000},
		"at the commit, of no bytes":    {empty, "", nil, 0, 10},
		"where it is expected":          {dgst, dgst, b, 1000, 10},
		"where it is expected, longer":  {dgst, dgst, b, 1000, 2000},
		"where it is expected, emptied": {dgst, dgst, b, 1000, 0},
	} {
		s := newStore(t)
		put(t, s, c.b)
		path, _ := s.Path(c.dgst)
		if err := errors.Join(os.Chmod(path, 0o644), os.Truncate(path, c.damaged), os.Chmod(path, 0o444)); err != nil {
			t.Fatal(err)
		}
		if got, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(c.b), c.size, c.expected); err != nil || got != c.dgst {
			t.Errorf("%s: %s, %v", what, got, err)
			continue
		}
		wantBlob(t, s, c.dgst, c.b)
		if _, err := s.Writer(t.Context(), "ref", 7, c.dgst); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: with another size: %v", what, err)
		}
	}
}

// Small blobs are copied through a shared buffer.
func TestSmallBlobsTakeLittleMemory(t *testing.T) {
	s := newStore(t)
	var before, after runtime.MemStats
	const n = 50
	runtime.ReadMemStats(&before)
	for i := range n {
		if _, err := content.WriteBlob(t.Context(), s, "ref", strings.NewReader(fmt.Sprint(i)), 0, ""); err != nil {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / n; each > 128<<10 {
		t.Errorf("%d bytes are allocated for a blob of two", each)
	}
}
