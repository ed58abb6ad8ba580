package stdio

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
)

// forwarded returns a sink, and the end of its pipe to read from.
func forwarded(t *testing.T) (*forward, *os.File) {
	t.Helper()
	r, w, err := newPipe()
	if err != nil {
		t.Fatal(err)
	}
	reader := os.NewFile(uintptr(r), "reader")
	t.Cleanup(func() { _ = reader.Close() })
	return newForward(w), reader
}

// A reader gets exactly what was written, and then the end.
func TestForward(t *testing.T) {
	t.Parallel()
	f, r := forwarded(t)
	var want bytes.Buffer
	for i := range 1000 {
		line := fmt.Sprintf("line %d\n", i)
		f.Write("stdout", []byte(line))
		want.WriteString(line)
	}
	go f.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%d bytes of %d: %v", len(got), want.Len(), err)
	}
}

// A writer does not wait for a slow reader. The reader is told how much is missing.
func TestForwardTellsWhatIsMissing(t *testing.T) {
	t.Parallel()
	f, r := forwarded(t)
	line := []byte(strings.Repeat("x", 1023) + "\n")
	const lines = 2000
	for range lines {
		f.Write("stdout", line)
	}
	go f.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	notes := regexp.MustCompile(`(?m)^distkit: (\d+) bytes of output are missing here: .*\n`).FindAllSubmatch(got, -1)
	var missing, told int
	for _, n := range notes {
		var one int
		_, _ = fmt.Sscan(string(n[1]), &one)
		missing, told = missing+one, told+len(n[0])
	}
	if missing == 0 || missing+len(got)-told != lines*len(line) {
		t.Errorf("%d bytes came, %d are said to be missing, of %d", len(got)-told, missing, lines*len(line))
	}
	if kept := len(got) - told; kept < forwardRoom/2 || kept > 3*forwardRoom {
		t.Errorf("%d bytes were kept", kept)
	}
}

// A writer does not fail when the reader is gone.
func TestForwardWithoutReader(t *testing.T) {
	t.Parallel()
	f, r := forwarded(t)
	_ = r.Close()
	for range 1000 {
		f.Write("stdout", make([]byte, 4096))
	}
	f.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.gone || len(f.queue) > 0 {
		t.Errorf("gone: %v, %d bytes are kept", f.gone, len(f.queue))
	}
}
