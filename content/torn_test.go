package content_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/content"

	"golang.org/x/sys/unix"
)

// What is torn goes once it is old, ingests and what a writer has stay, and so does all that
// is not ours.
func TestSweepTorn(t *testing.T) {
	s := newStore(t)
	blob := put(t, s, []byte("blob"))
	w, err := s.Writer(t.Context(), "alive", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	left, err := s.Writer(t.Context(), "left", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := left.Close(); err != nil {
		t.Fatal(err)
	}
	hour := time.Now().Add(-2 * time.Hour)
	var all []string
	file := func(old bool, elem ...string) {
		path := filepath.Join(append([]string{s.Root()}, elem...)...)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if elem[len(elem)-1] != "" {
			if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, path)
		for i := len(elem); old && i > 1 && (i == len(elem) || elem[0] == "ingest"); i-- {
			if err := os.Chtimes(filepath.Join(append([]string{s.Root()}, elem[:i]...)...), hour, hour); err != nil {
				t.Fatal(err)
			}
		}
	}
	key := func(c string) string { return strings.Repeat(c, 64) }
	for _, name := range []string{"ref", "data", "lock", "state.tmp"} {
		file(true, "ingest", key(string("abcd"[len(all)])), name)
	}
	if err := os.Mkdir(filepath.Join(s.Root(), "ingest", key("e")), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(s.Root(), "ingest", key("e")), hour, hour); err != nil {
		t.Fatal(err)
	}
	file(true, "ingest", ".tmp-old")
	file(true, "blobs", "sha256", ".tmp-old")
	file(true, "blobs", "sha512", ".tmp-old")
	torn := []string{
		"blobs/sha256/.tmp-old", "blobs/sha512/.tmp-old", "ingest/.tmp-old", "ingest/" + key("a"), "ingest/" + key("b"),
		"ingest/" + key("c"), "ingest/" + key("d"), "ingest/" + key("e"),
	}
	all = nil
	file(false, "ingest", ".tmp-new")
	file(false, "ingest", key("0"), "ref")
	file(true, "ingest", key("1"), "theirs")
	file(true, "ingest", "other", "ref")
	file(true, "ingest", key("f")+"0", "ref")
	file(true, "blobs", "sha256", "README")
	file(true, "blobs", "md5", ".tmp-old")

	sweep := func(before time.Time, dry bool) []string {
		t.Helper()
		var paths []string
		err := s.SweepTorn(t.Context(), before, dry, func(torn content.Torn) error {
			if d := torn.ChangedAt.Sub(hour).Abs(); d > time.Second || (torn.Size == 1) != strings.Contains(torn.Path, ".tmp-") {
				t.Errorf("%+v", torn)
			}
			paths = append(paths, torn.Path)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(paths)
		return paths
	}
	if got := sweep(hour.Add(-time.Minute), false); len(got) != 0 {
		t.Errorf("within the grace: %q", got)
	}
	held := lockFile(t, filepath.Join(s.Root(), "ingest", key("c"), "lock"))
	without := slices.DeleteFunc(slices.Clone(torn), func(p string) bool { return p == "ingest/"+key("c") })
	if got := sweep(time.Now(), true); !slices.Equal(got, without) {
		t.Errorf("dry: %q, want %q", got, without)
	}
	if got := sweep(time.Now(), false); !slices.Equal(got, without) {
		t.Errorf("swept %q, want %q", got, without)
	}
	held.Close()
	if got := sweep(time.Now(), false); !slices.Equal(got, []string{"ingest/" + key("c")}) {
		t.Errorf("once the lock is free: %q", got)
	}
	for _, path := range all {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	wantBlob(t, s, blob, []byte("blob"))
	if st := status(t, s, "alive"); !st.Active {
		t.Errorf("%+v", st)
	}
	status(t, s, "left")
}

// lockFile locks a file as a writer does.
func lockFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return f
}
