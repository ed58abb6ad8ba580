package events

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// read returns the names of the events that were added to the log since the last read.
func read(t *testing.T, l *Log) []string {
	t.Helper()
	var names []string
	err := l.Read(func(e Event, line []byte) error {
		var again Event
		if err := json.Unmarshal(line, &again); err != nil || again.Name != e.Name || e.Time.IsZero() || line[len(line)-1] != '\n' {
			t.Errorf("line %q of event %+v: %v", line, e, err)
		}
		names = append(names, e.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func openLog(t *testing.T, root string) *Log {
	t.Helper()
	l, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func name(i int) Event { return Event{Topic: "/images/create", Name: fmt.Sprint(i)} }

func TestWritersLoseNothingAndFollowersSeeAll(t *testing.T) {
	defer func(old int64) { limit = old }(limit)
	limit = 64 << 10 // the log is rotated once
	const writers, each = 8, 100
	root := t.TempDir()
	l := openLog(t, root)
	if got := read(t, l); got != nil {
		t.Errorf("a log that is not there has %q", got)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					Append(root, name(w*each+i))
				}
			})
		}
		wg.Wait()
	}()
	var got []string
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		got = append(got, read(t, l)...)
	}
	for _, seen := range [][]string{got, read(t, openLog(t, root))} {
		slices.Sort(seen)
		if len(slices.Compact(seen)) != writers*each {
			t.Errorf("%d events were seen, %d written", len(seen), writers*each)
		}
	}
	for _, file := range []string{current, rotated} {
		fi, err := os.Stat(filepath.Join(root, file))
		if err != nil || fi.Size() > limit {
			t.Errorf("%s: %v, or too long", file, err)
		}
	}
}

func TestTheLogStaysBounded(t *testing.T) {
	defer func(old int64) { limit = old }(limit)
	limit = 1 << 10
	root := t.TempDir()
	l := openLog(t, root)
	for i := range 200 {
		Append(root, name(i))
		if i%5 == 0 {
			read(t, l) // closes the file that it has read
		}
	}
	for _, file := range []string{current, rotated} {
		fi, err := os.Stat(filepath.Join(root, file))
		if err != nil || fi.Size() > limit {
			t.Errorf("%s: %v, or too long", file, err)
		}
	}
	if entries, _ := os.ReadDir(root); len(entries) != 2 {
		t.Errorf("files: %v", entries)
	}
	if got := read(t, openLog(t, root)); got[len(got)-1] != "199" {
		t.Errorf("the last is %q", got[len(got)-1])
	}
}

// Events that are recorded together are written as the same lines, and no line is divided between two files.
func TestManyAtOnce(t *testing.T) {
	defer func(old int64) { limit = old }(limit)
	limit = 2 * maxBatch
	root := t.TempDir()
	all := make([]Event, 3*maxBatch/100)
	for i := range all {
		all[i] = name(i)
	}
	Append(root, all...)
	Append(root)
	got := read(t, openLog(t, root))
	if len(got) < 10 || got[len(got)-1] != fmt.Sprint(len(all)-1) || !slices.IsSortedFunc(got, func(a, b string) int { return cmp.Compare(len(a), len(b)) }) {
		t.Errorf("%d events, the last %q", len(got), got[max(len(got)-1, 0):])
	}
	for _, file := range []string{current, rotated} {
		fi, err := os.Stat(filepath.Join(root, file))
		if err != nil || fi.Size() > limit {
			t.Errorf("%s: %v, or too long", file, err)
		}
	}
}

func TestATornLineIsEndedFirst(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, current)
	Append(root, name(1))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(b, b[:len(b)/2]...), 0o644); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, root)
	if got := read(t, l); !slices.Equal(got, []string{"1"}) {
		t.Errorf("before: %q", got)
	}
	Append(root, name(2))
	if got := read(t, l); !slices.Equal(got, []string{"2"}) {
		t.Errorf("after: %q", got)
	}
	if got, err := os.ReadFile(path); err != nil || bytes.Count(got, []byte("\n")) != 3 {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAFullDiskLeavesWholeLines(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=64k"); err != nil {
		if strings.Contains(os.Getenv("TEST_REQUIRE"), "root") {
			t.Fatal(err)
		}
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	const tries = 2000
	for i := range tries {
		Append(root, name(i))
	}
	b, err := os.ReadFile(filepath.Join(root, current))
	if err != nil || !bytes.HasSuffix(b, []byte("}\n")) {
		t.Errorf("the log ends with %.80q, %v", b[max(0, len(b)-80):], err)
	}
	if got := read(t, openLog(t, root)); len(got) == 0 || len(got) == tries {
		t.Errorf("%d events of %d on a full disk", len(got), tries)
	}
}

func TestWhatCanNotBeLoggedIsNoFailure(t *testing.T) {
	root := filepath.Join(t.TempDir(), "absent")
	Append(root, name(1))
	if _, err := os.Lstat(root); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if err := os.MkdirAll(filepath.Join(root, current), 0o755); err != nil {
		t.Fatal(err)
	}
	Append(root, name(1))
}

func TestFields(t *testing.T) {
	e := Event{Topic: "/content/create", Namespace: "ns", Digest: "sha256:x", Labels: map[string]string{"a.b": "c"}}
	for path, want := range map[string]string{
		"topic": "/content/create", "namespace": "ns", "event digest": "sha256:x", "digest": "sha256:x", "size": "0",
		"event labels a.b": "c", "labels a b": "c",
	} {
		if got, ok := e.Field(strings.Fields(path)); !ok || got != want {
			t.Errorf("%s: %q, %v", path, got, ok)
		}
	}
	for _, path := range []string{"", "name", "event", "event x", "labels x"} {
		if got, ok := e.Field(strings.Fields(path)); ok {
			t.Errorf("%s: %q", path, got)
		}
	}
}

func TestALineWithoutEndIsPassedOver(t *testing.T) {
	root := t.TempDir()
	file := filepath.Join(root, current)
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 256<<20); err != nil { // filled with zeros
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := openLog(t, root)
	if got := read(t, l); got != nil {
		t.Errorf("zeros are the events %q", got)
	}
	for _, text := range []string{`"topic":"/x","name":"within"}` + "\n", `{"topic":"/x","time":"2026-01-01T00:00:00Z","name":"after"}` + "\n"} {
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, l); !slices.Equal(got, []string{"after"}) {
		t.Errorf("after zeros: %q", got)
	}
	if cap(l.part) > 4*maxLine {
		t.Errorf("%d bytes are kept of a line", cap(l.part))
	}
}

// If a log is truncated, its followers go on. Counted events can still be read.
func TestTruncatedAndCounted(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"a", "b", "c"} {
		Append(root, Event{Topic: "/images/create", Name: name})
	}
	log, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	n, err := log.Count(func(e Event) (bool, error) { return e.Name != "b", nil })
	if err != nil || n != 2 {
		t.Errorf("counted %d, %v", n, err)
	}
	read := func(want string) {
		t.Helper()
		got := ""
		if err := log.Read(func(e Event, _ []byte) error { got += e.Name; return nil }); err != nil || got != want {
			t.Errorf("read %q, %v; want %q", got, err, want)
		}
	}
	read("abc")
	if err := os.Truncate(filepath.Join(root, current), 0); err != nil {
		t.Fatal(err)
	}
	Append(root, Event{Topic: "/images/create", Name: "d"})
	read("d")
	read("")
}
