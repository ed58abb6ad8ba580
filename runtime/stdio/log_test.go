package stdio

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/disk"
)

func dir(t *testing.T) Dir {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "c"), 0o700); err != nil {
		t.Fatal(err)
	}
	return Dir{disk.Tree(root), "c"}
}

func newWriter(t *testing.T, d Dir, limit int64) *Writer {
	t.Helper()
	w, err := NewWriter(d, limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

// all returns everything that a new reader reads.
func all(t *testing.T, d Dir) (text string, missing int64) {
	t.Helper()
	r, err := NewReader(d, false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	err = r.Read(func(e Entry) error {
		text, missing = text+string(e.Text), missing+e.Missing
		if e.Time().IsZero() && e.Missing == 0 {
			t.Errorf("%q has no time", e.Text)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return text, missing
}

// A reader that misses a rotation reports how many bytes it has missed.
func TestWhatIsMissingIsTold(t *testing.T) {
	t.Parallel()
	d := dir(t)
	w := newWriter(t, d, 4096)
	r, err := NewReader(d, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i := range 1000 {
		w.Write("stdout", fmt.Appendf(nil, "line %d\n", i))
	}
	var seen, missing int64
	last := ""
	if err := r.Read(func(e Entry) error {
		missing += e.Missing
		if last = string(e.Text); e.Missing == 0 {
			seen += int64(len(e.at)) + int64(len(" stdout F ")+len(e.Text))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// Each of the three files read begins with an offset line, which is not an entry.
	w.mu.Lock()
	end := w.offset + w.size
	w.mu.Unlock()
	own := int64(0)
	for _, f := range []string{"log.1", "log"} {
		b, err := os.ReadFile(d.Tree.Path("c/" + f))
		if err != nil {
			t.Fatal(err)
		}
		own += int64(bytes.IndexByte(b, '\n') + 1)
	}
	first := int64(len(appendLine(nil, time.Now().UTC(), offsetStream, 'F', []byte("0"))))
	if missing == 0 || seen+missing+own < end-first-64 || seen+missing+own > end-first+64 || last != "line 999\n" {
		t.Errorf("%d bytes were seen, %d are missing, of %d; the last line is %q", seen, missing, end, last)
	}
}

// A reader that follows a log opens each file as it appears. So it gets every line, however slow it is. held returns
// how many files a reader holds open.
func (r *Reader) held() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.files)
}

// opened reports whether a reader has opened the file that is being written.
func opened(w *Writer, r *Reader) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.files) > 0 && sameFile(r.files[len(r.files)-1], w.file)
}

func TestSlowReaderHasEveryLine(t *testing.T) {
	t.Parallel()
	d := dir(t)
	w := newWriter(t, d, 16<<10)
	watcher, err := Watch(d.Tree.Path("c"))
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close()
	r, err := NewReader(d, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	const lines = 3000
	next, done := 0, false
	first := make(chan struct{})
	go func() {
		for i := range lines {
			w.Write("stdout", fmt.Appendf(nil, "line %d\n", i))
			if i == 0 {
				<-first // the reader is following
			}
			for i%100 == 0 && !opened(w, r) && t.Context().Err() == nil {
				time.Sleep(time.Millisecond) // a busy machine might otherwise not run the watcher between two rotations
			}
		}
	}()
	err = r.Follow(t.Context(), watcher, func() (bool, error) { return done, nil }, func(e Entry) error {
		switch {
		case e.Missing > 0:
			t.Errorf("%d bytes are missing before line %d", e.Missing, next)
		case string(e.Text) != fmt.Sprintf("line %d\n", next):
			t.Fatalf("%q instead of line %d", e.Text, next)
		}
		if next++; next == 1 {
			close(first)
			for r.held() < 5 && t.Context().Err() == nil { // until the log has been rotated several times
				time.Sleep(time.Millisecond)
			}
		}
		done = next == lines
		return nil
	}, nil)
	if err != nil || next != lines {
		t.Errorf("%d lines, %v", next, err)
	}
	if b, err := os.ReadFile(d.Tree.Path("c/log")); err != nil || offsetOf(b) < 64<<10 {
		t.Errorf("the log was not put aside: it begins with %.60q, %v", b, err)
	}
}

// The output of an earlier run is kept. An incomplete line that a killed writer has left does not hide the next line.
func TestAppendsToWhatIsThere(t *testing.T) {
	t.Parallel()
	d := dir(t)
	w := newWriter(t, d, 0)
	w.Write("stdout", []byte("crashed\n"))
	w.Close()
	f, err := os.OpenFile(d.Tree.Path("c/log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("2026-01-01T00:00:00Z stdout F to"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	w = newWriter(t, d, 0)
	w.Begin()
	w.Write("stderr", []byte("again\npart"))
	if got, missing := all(t, d); got != "crashed\nto\nagain\npart" || missing != 0 {
		t.Errorf("%q, %d missing", got, missing)
	}
	if b, _ := os.ReadFile(d.Tree.Path("c/log")); strings.Count(string(b), " begin F ") != 1 {
		t.Errorf("no mark between the runs: %q", b)
	}
}

// Bytes that can't be written are counted. Readers get the count once the log can be written again.
func TestWhatWasNotWrittenIsTold(t *testing.T) {
	t.Parallel()
	d := dir(t)
	w := newWriter(t, d, 100)
	w.Write("stdout", []byte("one\n"))
	if err := os.Rename(d.Tree.Path("c"), d.Tree.Path("away")); err != nil {
		t.Fatal(err)
	}
	w.Write("stdout", bytes.Repeat([]byte("two\n"), 10)) // does not fit into the first file
	if err := os.Rename(d.Tree.Path("away"), d.Tree.Path("c")); err != nil {
		t.Fatal(err)
	}
	w.Write("stdout", []byte("three\n"))
	if got, missing := all(t, d); !strings.HasSuffix(got, "three\n") || strings.Contains(got, "two") || missing < 40 {
		t.Errorf("%q, %d missing", got, missing)
	}
}

// Invalid lines are skipped.
func TestOddLines(t *testing.T) {
	t.Parallel()
	d := dir(t)
	text := "x offset F -1\n\nnonsense\n2026-01-01T00:00:00Z stdin F a\n2026-01-01T00:00:00Z stdout Q a\n2026-01-01T00:00:00Z lost F x\n" +
		"2026-01-01T00:00:00Z stdout F " + strings.Repeat("y", 3<<20) + "\n2026-01-01T00:00:00Z stdout F good\n"
	if err := os.WriteFile(d.Tree.Path("c/log"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, missing := all(t, d); got != "good\n" || missing != 0 {
		t.Errorf("%.60q, %d missing", got, missing)
	}
}

// A reader with no room for more open files still reads the newest ones.
func TestReaderReachesTheEndOfALongBacklog(t *testing.T) {
	t.Parallel()
	d := dir(t)
	w := newWriter(t, d, 100)
	r, err := NewReader(d, false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i := range 4 * backlog {
		w.Write("stdout", fmt.Appendf(nil, "%050d\n", i))
		if err := r.find(); err != nil { // as the watcher does for a new file
			t.Fatal(err)
		}
	}
	lines, last, missing := 0, "", int64(0)
	err = r.Read(func(e Entry) error {
		if missing += e.Missing; e.Missing == 0 {
			lines, last = lines+1, string(e.Text)
		}
		return nil
	})
	if want := fmt.Sprintf("%050d\n", 4*backlog-1); err != nil || last != want || missing == 0 || lines < backlog {
		t.Errorf("%d lines, %d bytes missing, the last line is %q; %v", lines, missing, last, err)
	}
}
