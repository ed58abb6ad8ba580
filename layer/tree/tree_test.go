package tree

import (
	"archive/tar"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func apply[F any](t *testing.T, tr *Tree[F], h tar.Header) Change {
	t.Helper()
	c, err := tr.Apply(&h)
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	return c
}

// show lists all paths of a tree in order.
func show[F any](tr *Tree[F], dir Entry) (paths []string) {
	for _, e := range tr.Children(dir, nil) {
		paths = append(paths, tr.Path(e))
		if tr.Kind(e) == Dir {
			paths = append(paths, show(tr, e)...)
		}
	}
	return paths
}

// Random names are added and deleted in many layers. The tree then has the same names as a map.
func TestNamesAreFoundAgain(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	tr := New(Options[int]{})
	want := map[string]int{}
	for l := 1; l <= 40; l++ {
		tr.NextLayer()
		for range 500 {
			dir, name := fmt.Sprint("d", r.IntN(9)), strings.Repeat("n", r.IntN(250))+fmt.Sprint(r.IntN(400))
			p := dir + "/" + name
			if r.IntN(3) == 0 {
				apply(t, tr, tar.Header{Typeflag: tar.TypeReg, Name: dir + "/.wh." + name})
				if want[p] < l {
					delete(want, p)
				}
				continue
			}
			c := apply(t, tr, tar.Header{Typeflag: tar.TypeReg, Name: p})
			*tr.File(c.Entry) = l
			want[p] = l
		}
	}
	got := 0
	for _, p := range show(tr, Root) {
		if !strings.Contains(p, "/") {
			continue
		}
		got++
		e, err := tr.Lookup("/"+p, false)
		if err != nil || *tr.File(e) != want[p] || tr.Layer(e) != want[p] {
			t.Errorf("%s: got layer %d and %d, not %d: %v", p, tr.Layer(e), *tr.File(e), want[p], err)
		}
	}
	if got != len(want) {
		t.Errorf("got %d names, not %d", got, len(want))
	}
}

func TestChanges(t *testing.T) {
	t.Parallel()
	var removed, deleted []string
	var tr *Tree[string]
	tr = New(Options[string]{
		Removed: func(e Entry, name *string) { removed = append(removed, *name+"="+tr.Path(e)) },
		Deleted: func(e Entry) { deleted = append(deleted, tr.Path(e)) },
	})
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	step := func(h tar.Header, action Action, lower bool) {
		t.Helper()
		c := apply(t, tr, h)
		if c.Action != action || c.Lower != lower {
			t.Errorf("%s: got %+v", h.Name, c)
		}
		if action == Made {
			*tr.File(c.Entry) = fmt.Sprint(h.Name, tr.Layer(c.Entry))
		}
	}
	tr.NextLayer()
	step(tar.Header{Typeflag: tar.TypeDir, Name: "d/"}, Made, false)
	for _, name := range []string{"d/a", "d/b", "d/c/x", "d/e/y", "f"} {
		step(file(name), Made, false)
	}
	step(tar.Header{Typeflag: tar.TypeLink, Name: "g", Linkname: "d/a"}, Linked, false)
	step(tar.Header{Typeflag: tar.TypeSymlink, Name: "s", Linkname: "/d/../d/e"}, Made, false)
	tr.NextLayer()
	step(file("d/b"), Made, true)
	step(file("d/c/z"), Made, false)
	step(file("d/.wh..wh..opq"), Deleted, false)
	step(file("d/a"), Made, true) // the marker of an opaque directory deleted it
	step(file(".wh.f"), Deleted, false)
	step(tar.Header{Typeflag: tar.TypeDir, Name: "d/"}, Merged, true)
	step(tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "g"}, Linked, false)
	step(tar.Header{Typeflag: tar.TypeDir, Name: "/"}, Merged, false)
	if got := fmt.Sprint(show(tr, Root)); got != "[d d/a d/b d/c d/c/z g h s]" {
		t.Errorf("got %s", got)
	}
	slices.Sort(deleted)
	if got := fmt.Sprint(deleted); got != "[d/a d/c/x d/e f]" {
		t.Errorf("deleted: %s", got)
	}
	slices.Sort(removed) // d/a of the first layer is not among them: that file has another name
	if got := fmt.Sprint(removed); got != "[d/b1=d/b d/c/x1=d/c/x d/e/y1=d/e/y f1=f]" {
		t.Errorf("removed: %s", got)
	}
	g, _ := tr.Lookup("g", false)
	if h, err := tr.Lookup("h", false); err != nil || tr.File(g) != tr.File(h) || tr.Links(g) != 2 || *tr.File(h) != "d/a1" {
		t.Errorf("a hard link is another file, or has %d names", tr.Links(g))
	}
}

func TestLookup(t *testing.T) {
	t.Parallel()
	tr := New(Options[int]{})
	tr.NextLayer()
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeReg, Name: "usr/lib/f"}, {Typeflag: tar.TypeSymlink, Name: "lib", Linkname: "usr/lib"},
		{Typeflag: tar.TypeSymlink, Name: "up", Linkname: "../../../usr"}, {Typeflag: tar.TypeSymlink, Name: "usr/abs", Linkname: "/lib/f"},
		{Typeflag: tar.TypeSymlink, Name: "loop", Linkname: "loop"}, {Typeflag: tar.TypeSymlink, Name: "wide", Linkname: strings.Repeat("x/", 2047)},
	} {
		apply(t, tr, h)
	}
	for p, want := range map[string]string{
		"lib/f": "usr/lib/f", "/up/lib/f": "usr/lib/f", "usr/abs": "usr/lib/f", "../lib/../../usr/abs": "usr/lib/f", "": "", "lib": "usr/lib",
	} {
		if e, err := tr.Lookup(p, true); err != nil || tr.Path(e) != want {
			t.Errorf("%s: got %s, %v", p, tr.Path(e), err)
		}
	}
	if e, err := tr.Lookup("up/abs", false); err != nil || tr.Kind(e) != Symlink {
		t.Errorf("a symbolic link: %v", err)
	}
	for p, is := range map[string]func(error) bool{
		"lib/g": errdefs.IsNotFound, "lib/f/g": errdefs.IsInvalidArgument, "loop": errdefs.IsInvalidArgument, "wide": errdefs.IsNotFound,
	} {
		if _, err := tr.Lookup(p, true); !is(err) {
			t.Errorf("%s: got %v", p, err)
		}
	}
}

// A node keeps all that it is given, whatever the numbers beside it.
func TestNode(t *testing.T) {
	t.Parallel()
	const most = maxEntries - 1
	for _, kind := range kinds {
		for _, layer := range []uint16{0, 1, 63, 64, 4095, 4096, maxLayer} {
			for _, what := range []uint32{0, 1, most} {
				n := newNode(most, most-1)
				n.set(Whiteout, most, maxLayer)
				n.set(kind, what, layer)
				if n.parent() != most || n.next() != most-1 || n.kind() != kind || n.what() != what || n.layer() != layer {
					t.Errorf("kind %d, layer %d, number %d: got %d, %d, %d, %d, %d", kind, layer, what, n.kind(), n.layer(), n.what(), n.parent(), n.next())
				}
			}
		}
	}
}

// A file with a name of 12 bytes takes less than 40 bytes, and at least as much is counted as is taken.
func TestMemory(t *testing.T) {
	const n = 200_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	tr := New(Options[[12]byte]{})
	tr.NextLayer()
	for i := range n {
		apply(t, tr, tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d%03d/file%08d", i/1000, i)})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("%d bytes a file, counted as %d", used/n, tr.memory/n)
	if used > 40*n || used > tr.memory {
		t.Errorf("%d files take %d bytes, counted as %d", n, used, tr.memory)
	}
	tr = New(Options[[12]byte]{MaxMemory: tr.memory / 2})
	for i := 0; ; i++ {
		if _, err := tr.Apply(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i)}); errdefs.IsFailedPrecondition(err) {
			return
		} else if err != nil || i == n {
			t.Fatalf("%d files: %v", i, err)
		}
	}
}

// Offsets of names have 32 bits. More names than fit are refused.
func TestTooManyBytesOfNames(t *testing.T) {
	t.Parallel()
	tr := New(Options[int]{})
	tr.NextLayer()
	apply(t, tr, tar.Header{Name: "before", Typeflag: tar.TypeReg})
	all := tr.names.chunks
	tr.names.chunks = append(make([][]byte, 1<<32/nameChunk-1), all...)
	if _, err := tr.Apply(&tar.Header{Name: "after", Typeflag: tar.TypeReg}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v", err)
	}
}
