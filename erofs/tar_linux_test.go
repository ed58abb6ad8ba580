package erofs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"distkit/layer"
)

// What the archive's reader does not support is left out and counted.
func TestTarLeavesOut(t *testing.T) {
	t.Parallel()
	old, late := file("old", ""), file("late", "")
	old.ModTime, late.ModTime = time.Unix(-5, 7), time.Unix(1<<33, 0)
	tenth, odd := file("tenth", ""), file("odd", "")
	tenth.ModTime, odd.ModTime = time.Unix(5, 1e8), time.Unix(5, 123)
	b := NewBuilder(Options{Scratch: t.TempDir()})
	defer b.Close()
	l := pack(t, old, late, tenth, odd, xattr(xattr(xattr(file("x", "x"), "user.a", "1"), "user.b", "2"), "trusted.c", "3"),
		tarEntry{tar.Header{Typeflag: tar.TypeLink, Name: "y", Linkname: "x"}, ""})
	if err := b.Add(t.Context(), bytes.NewReader(l), ""); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	err := b.WriteTar(t.Context(), &archive, TarOptions{Latest: 1 << 32, NineDigits: true, Holds: func(before []layer.Xattr, _ layer.Xattr) bool {
		return len(before) < 2 // sorted by name
	}})
	if err != nil {
		t.Fatal(err)
	}
	if u := b.Unset(); len(u) != 2 || u["times"] != 3 || u["user attributes"] != 1 {
		t.Errorf("left out: %v", u)
	}
	image, _, err := build(t, Options{}, archive.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	lines, err := read(image)
	for name, at := range map[string]string{"old": "@0.0", "late": "@4294967296.0", "tenth": "@5.100000001", "odd": "@5.000000123"} {
		if err != nil || !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, name+" ") && strings.Contains(l, at) }) {
			t.Errorf("%v: %s is not %s: %s", err, name, at, strings.Join(lines, "\n"))
		}
	}
	if s := strings.Join(lines, "\n"); strings.Count(s, `user.a="1"`) != 2 || strings.Contains(s, "user.b") || strings.Count(s, `trusted.c="3"`) != 2 {
		t.Error(s)
	}
}

func TestTarOfAnIndex(t *testing.T) {
	t.Parallel()
	b := NewBuilder(Options{Index: true})
	defer b.Close()
	if err := b.WriteTar(t.Context(), io.Discard, TarOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v", err)
	}
}

// A memory is a writer that measures the memory in use when half of the archive has been written.
type memory struct {
	at, written int
	used        uint64
}

func (m *memory) Write(p []byte) (int, error) {
	if m.written += len(p); m.used == 0 && m.written >= m.at {
		m.used = inUse()
	}
	return len(p), nil
}

func inUse() uint64 {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

// The paths of hard links are not kept in memory: deep in a tree they are long.
func TestTarKeepsNoPaths(t *testing.T) {
	b := NewBuilder(Options{Scratch: t.TempDir()})
	defer b.Close()
	dir := strings.Repeat(strings.Repeat("d", 200)+"/", 19)
	const files = 2000
	var l []tarEntry
	for i := range files {
		l = append(l, file(fmt.Sprint(dir, i), ""), tarEntry{tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprint(dir, i, "b"), Linkname: fmt.Sprint(dir, i)}, ""})
	}
	if err := b.Add(t.Context(), bytes.NewReader(pack(t, l...)), ""); err != nil {
		t.Fatal(err)
	}
	l = nil
	w := memory{at: files * 2 * len(dir)}
	before := inUse()
	if err := b.WriteTar(t.Context(), &w, TarOptions{}); err != nil {
		t.Fatal(err)
	}
	if w.used == 0 || w.used > before+files*1000 {
		t.Errorf("%d bytes, then %d", before, w.used)
	}
	runtime.KeepAlive(b)
}
