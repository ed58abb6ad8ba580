package content_test

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"distkit/content"

	"github.com/opencontainers/go-digest"
)

// sweepIngests gives what was swept, by ref or path.
func sweepIngests(t *testing.T, s *content.Store, before time.Time, dryRun bool) (refs []string) {
	t.Helper()
	err := s.SweepIngests(t.Context(), before, dryRun, func(l content.Leftover) error {
		refs = append(refs, cmp.Or(l.Ref, l.Path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(refs)
	return refs
}

// leave writes some bytes into an ingest and closes it.
func leave(t *testing.T, s *content.Store, ref string) {
	t.Helper()
	w, err := s.Writer(t.Context(), ref, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(ref)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func ingestDir(s *content.Store, ref string) string {
	return filepath.Join(s.Root(), "ingest", digest.FromString(ref).Encoded())
}

func TestSweepIngests(t *testing.T) {
	s := newStore(t)
	later, hourAgo := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	if got := sweepIngests(t, s, later, false); len(got) != 0 {
		t.Errorf("in no store: %q", got)
	}
	kept := put(t, s, []byte("a blob"))
	leave(t, s, "old")
	leave(t, s, "young")
	w, err := s.Writer(t.Context(), "busy", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	// Old in all its files.
	age := func(dir string) {
		files, _ := filepath.Glob(dir + "/*")
		for _, f := range append(files, dir) {
			if err := os.Chtimes(f, hourAgo, hourAgo); err != nil {
				t.Fatal(err)
			}
		}
	}
	age(ingestDir(s, "old"))
	age(ingestDir(s, "busy"))
	if got := sweepIngests(t, s, time.Now().Add(-time.Minute), true); !slices.Equal(got, []string{"old"}) {
		t.Errorf("dry run: %q", got)
	}
	if list, _ := s.ListStatuses(t.Context()); len(list) != 3 {
		t.Errorf("after a dry run: %+v", list)
	}
	if got := sweepIngests(t, s, time.Now().Add(-time.Minute), false); !slices.Equal(got, []string{"old"}) {
		t.Errorf("%q", got)
	}
	// Resumed since, by one who wrote nothing: not old.
	age(ingestDir(s, "young"))
	again, err := s.Writer(t.Context(), "young", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if again.Offset() != 5 {
		t.Errorf("resumes at %d", again.Offset())
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if got := sweepIngests(t, s, time.Now().Add(-time.Minute), false); len(got) != 0 {
		t.Errorf("what was resumed: %q", got)
	}
	if got := sweepIngests(t, s, later, false); !slices.Equal(got, []string{"young"}) {
		t.Errorf("%q", got)
	}
	if _, err := w.Write([]byte("goes on")); err != nil {
		t.Error(err)
	}
	if err := w.Commit(t.Context(), 0, "", nil); err != nil {
		t.Error(err)
	}
	wantBlob(t, s, kept, []byte("a blob"))
	if left, _ := os.ReadDir(filepath.Join(s.Root(), "ingest")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// What a crash, or somebody else, can leave of an ingest: of each shape all goes that is ours,
// and nothing else; and before that, a writer of that ref gets on.
func TestTornIngests(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"empty":           {},
		"lock alone":      {"lock": ""},
		"no data":         {"lock": "", "ref": "torn\n", "startedat": "2020-01-01T00:00:00Z\n"},
		"no ref":          {"lock": "", "data": "stale bytes"},
		"empty ref":       {"lock": "", "data": "stale bytes", "ref": ""},
		"bad ref":         {"lock": "", "data": "stale bytes", "ref": "a\x00b\n"},
		"no lock":         {"data": "stale bytes", "ref": "torn\n"},
		"too long":        {"lock": "", "data": "stale bytes", "ref": "torn\n", "total": "3\n"},
		"torn total":      {"lock": "", "data": "stale bytes", "ref": "torn\n", "total": "12x"},
		"negative total":  {"lock": "", "data": "stale bytes", "ref": "torn\n", "total": "-5\n"},
		"bad times":       {"lock": "", "data": "stale bytes", "ref": "torn\n", "startedat": "yesterday\n", "updatedat": "\n"},
		"bad digest":      {"lock": "", "data": "stale bytes", "ref": "torn\n", "expected": "sha256:12\n"},
		"torn state":      {"lock": "", "data": "stale bytes", "ref": "torn\n", "state": `{"algorithm":"sha256","off`},
		"state too far":   {"lock": "", "data": "st", "ref": "torn\n", "state": `{"algorithm":"sha256","offset":9,"boot":"x","state":"AA=="}`},
		"state aside":     {"lock": "", "data": "stale bytes", "ref": "torn\n", "state.tmp": "{"},
		"updatedat alone": {"updatedat": "2020-01-01T00:00:00Z\n"},
		"unknown too":     {"lock": "", "data": "stale bytes", "ref": "torn\n", "notes": "mine"},
		"unknown alone":   {"notes": "mine"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			if err := s.Init(); err != nil {
				t.Fatal(err)
			}
			make := func() {
				dir := ingestDir(s, "torn")
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				for f, text := range files {
					if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			left := func() (names []string) {
				entries, _ := os.ReadDir(ingestDir(s, "torn"))
				for _, e := range entries {
					names = append(names, e.Name())
				}
				return names
			}
			want := []string(nil)
			if _, ok := files["notes"]; ok {
				want = []string{"notes"}
			}
			later := time.Now().Add(time.Hour)
			make()
			if _, err := s.ListStatuses(t.Context()); err != nil {
				t.Error(err)
			}
			swept := sweepIngests(t, s, later, false)
			if (len(swept) == 1) != (name != "unknown alone") {
				t.Errorf("swept %q", swept)
			}
			if got := left(); !slices.Equal(got, want) {
				t.Errorf("left by the sweep: %q", got)
			}
			if swept := sweepIngests(t, s, later, false); len(swept) != 0 {
				t.Errorf("swept again: %q", swept)
			}
			make()
			w, err := s.Writer(t.Context(), "torn", 5, "")
			if err != nil {
				t.Fatal(err)
			}
			if w.Offset() != 0 {
				t.Errorf("it believes %d bytes of another boot, or of none", w.Offset())
			}
			if _, err := w.Write([]byte("right")); err != nil {
				t.Fatal(err)
			}
			if err := w.Commit(t.Context(), 0, "", nil); err != nil {
				t.Fatal(err)
			}
			wantBlob(t, s, digest.FromString("right"), []byte("right"))
			if got := left(); !slices.Equal(got, want) {
				t.Errorf("left by the commit: %q", got)
			}
		})
	}
}

func TestSweepFilesWrittenAside(t *testing.T) {
	s := newStore(t)
	put(t, s, []byte("x"))
	for name, age := range map[string]time.Duration{"ingest/.tmp-old": 2 * time.Hour, "ingest/.tmp-young": time.Minute, "blobs/sha256/.tmp-put": 2 * time.Hour, "ingest/other": 2 * time.Hour} {
		path := filepath.Join(s.Root(), name)
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if at := time.Now().Add(-age); os.Chtimes(path, at, at) != nil {
			t.Fatal("can't change times")
		}
	}
	if got := sweepIngests(t, s, time.Now().Add(-3*time.Hour), false); len(got) != 0 {
		t.Errorf("within the grace: %q", got)
	}
	if got := sweepIngests(t, s, time.Now(), false); !slices.Equal(got, []string{"blobs/sha256/.tmp-put", "ingest/.tmp-old"}) {
		t.Errorf("%q", got)
	}
}
