package archive

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"

	"distkit/disk/sys"
	"distkit/layer"
)

// calls counts the system calls on files that f makes. No other test may run at the same time.
func calls(f func()) int64 {
	var n atomic.Int64
	sys.Calling = func() { n.Add(1) }
	defer func() { sys.Calling = nil }()
	f()
	return n.Load()
}

// callsPerByte bounds the work of an apply: the number of system calls per uncompressed byte of a layer, whatever the
// layer has. Names of one letter are the worst case: each makes a directory.
const callsPerByte = 4

func repeat(n int, f func(i int) entry) (list []entry) {
	for i := range n {
		list = append(list, f(i))
	}
	return list
}

// Small layers that would be a lot of work, if each entry did all of it, are refused, or applied with at most the
// stated number of system calls per entry.
func TestWorkIsBounded(t *testing.T) {
	const n = 200
	files := func(dir string, f func(i int) string) []entry {
		return repeat(n, func(i int) entry { return fileEntry(dir+f(i), "") })
	}
	number := func(i int) string { return fmt.Sprint("f", i) }
	deep := strings.Repeat("d/", 500)
	// Symbolic links, each of which leads through the one before, with many components on the way.
	links := []entry{dirEntry("d", 0o755), symlink("l0", strings.Repeat("d/../", 800))}
	for i := 1; i < 39; i++ {
		links = append(links, symlink(fmt.Sprint("l", i), strings.Repeat("d/../", 800)+fmt.Sprint("l", i-1)))
	}
	for name, test := range map[string]struct {
		base, layer []entry
		most        int64 // system calls per entry
		refused     bool
	}{
		"opaque markers over many files": {
			layer: append(files("d/", number), repeat(n, func(int) entry { return fileEntry("d/.wh..wh..opq", "") })...), most: 10},
		"opaque markers over many files of lower layers": {
			base: files("d/", number), layer: repeat(n, func(int) entry { return fileEntry("d/.wh..wh..opq", "") }), most: 10},
		"opaque markers over many directories of both": {
			base:  append(files("d/", func(i int) string { return fmt.Sprintf("s%d/f", i) }), files("", number)...),
			layer: append(files("d/", func(i int) string { return fmt.Sprintf("s%d/g", i) }), repeat(n, func(int) entry { return fileEntry("d/.wh..wh..opq", "") })...), most: 20},
		"opaque markers from the deepest directory up": {
			layer: append(files(strings.Repeat("d/", n), number), repeat(n, func(i int) entry { return fileEntry(strings.Repeat("d/", n-i)+".wh..wh..opq", "") })...), most: 20},
		"files below a deep directory": {
			layer: files(deep, number), most: 20},
		"directories below a deep one": {
			layer: files(deep, func(i int) string { return fmt.Sprintf("s%d/f", i) }), most: 40},
		"chains of symbolic links": {
			layer: append(links[:len(links):len(links)], files("l38/", func(i int) string { return fmt.Sprintf("s%d/f", i) })...), refused: true},
		"hard links through chains of symbolic links": {
			layer: append(links[:len(links):len(links)], repeat(n, func(i int) entry { return hardlink(fmt.Sprint("h", i), fmt.Sprintf("l38/s%d/missing", i)) })...), refused: true},
		"a whiteout of each file, and again": {
			base:  files("d/", number),
			layer: append(files("d/.wh.", number), files("d/.wh.", number)...), most: 8},
		"directories replaced in turn": {
			layer: repeat(n, func(i int) entry {
				switch i % 3 {
				case 0:
					return dirEntry("d", 0o755)
				case 1:
					return fileEntry("d/e/f/g", "")
				}
				return fileEntry("d", "")
			}), most: 40},
	} {
		for _, form := range []Whiteouts{Remove, OverlayUser} {
			t.Run(fmt.Sprint(name, " ", form), func(t *testing.T) {
				root := t.TempDir()
				if form == Remove {
					mustApply(t, root, layerOf(t, test.base...), Options{})
				}
				data := layerOf(t, test.layer...)
				var err error
				got := calls(func() { _, err = apply(t, root, data, Options{Whiteouts: form}) })
				if test.refused != errdefs.IsInvalidArgument(err) || !test.refused && err != nil {
					t.Fatal(err)
				}
				if test.refused {
					test.most = 300
				}
				if most := test.most * int64(len(test.layer)); got > most {
					t.Errorf("%d calls for %d entries: more than %d", got, len(test.layer), most)
				}
				if most := callsPerByte * int64(len(data)); got > most {
					t.Errorf("%d calls for %d bytes", got, len(data))
				}
			})
		}
	}
}

// The files of lower layers in a directory are hidden once. Files that the layer itself put there stay.
func TestOpaqueTwice(t *testing.T) {
	root := t.TempDir()
	mustApply(t, root, layerOf(t, fileEntry("d/low", ""), fileEntry("d/e/low", "")), Options{})
	mustApply(t, root, layerOf(t, fileEntry("d/e/.wh..wh..opq", ""), fileEntry("d/e/high", ""), fileEntry("d/.wh..wh..opq", ""), fileEntry("d/high", ""),
		fileEntry("d/.wh..wh..opq", ""), fileEntry("d/e/.wh.high", ""), fileEntry("d/.wh.e", ""), fileEntry(".wh.d", "")), Options{})
	if got := strings.Join(names(t, root), " "); got != "d d/e d/e/high d/high" {
		t.Error(got)
	}
}

// Hidden files below a marker are found with a few descriptors, however deep they are.
func TestOpaqueAboveADeepTree(t *testing.T) {
	const levels = 400
	deep := strings.Repeat("d/", levels)
	data := layerOf(t, fileEntry(deep+"high", ""), fileEntry(deep+".wh.low", ""), fileEntry("d/.wh..wh..opq", ""))
	for _, form := range []Whiteouts{Remove, OverlayUser} {
		root := t.TempDir()
		if form == Remove {
			mustApply(t, root, layerOf(t, fileEntry(deep+"low", ""), fileEntry("d/low", "")), Options{})
		}
		var mu sync.Mutex
		most := 0
		sys.Calling = func() {
			mu.Lock()
			defer mu.Unlock()
			list, _ := os.ReadDir("/proc/self/fd")
			most = max(most, len(list))
		}
		_, err := apply(t, root, data, Options{Whiteouts: form})
		sys.Calling = nil
		if err != nil || most > levels/2 {
			t.Errorf("form %d: %v, with %d files open", form, err, most)
		}
		if got := len(names(t, root)); got != levels+1 {
			t.Errorf("form %d: %d names are left, not %d", form, got, levels+1)
		}
	}
}

// A directory that was opaque, was replaced by a file, and is made again, is opaque again.
func TestOpaqueReplaced(t *testing.T) {
	root := t.TempDir()
	mustApply(t, root, layerOf(t, fileEntry("d/.wh..wh..opq", ""), fileEntry("d", ""), dirEntry("d", 0o755)), Options{Whiteouts: OverlayUser})
	if got := xattrDump(filepath.Join(root, "d")); !strings.Contains(got, "user.overlay.opaque") {
		t.Errorf("it has %q", got)
	}
}

// No path is longer than the kernel accepts, with symbolic links on the way or without.
func TestDepthIsBounded(t *testing.T) {
	root := t.TempDir()
	half := strings.Repeat("d/", 1500)
	_, err := apply(t, root, layerOf(t, dirEntry(half, 0o755), symlink("l", half), fileEntry("l/"+half+"f", "")), Options{})
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("error is %v", err)
	}
}

// The number of holes that are read is limited by the number of the layer's bytes. That holds for entries whose content
// is not wanted, too.
func TestHolesAreBounded(t *testing.T) {
	sparse := func(name string, size int64) []byte {
		b := block(nil, 'x', "pax", record("GNU.sparse.major", "1")+record("GNU.sparse.minor", "0")+record("GNU.sparse.name", name)+record("GNU.sparse.realsize", fmt.Sprint(size)))
		return block(b, '0', name, "1\n0\n0\n"+strings.Repeat("\x00", 506))
	}
	_, err := apply(t, t.TempDir(), append(sparse(".wh.gone", layer.MaxSparse-1), make([]byte, 1024)...), Options{})
	if !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// The text of unresolved entries is no longer than the layer, apart from a constant.
func TestUnresolvedIsBounded(t *testing.T) {
	deep := strings.Repeat("d/", 1900)
	list := []entry{symlink("l", deep)}
	for i := range 2000 {
		list = append(list, hardlink(fmt.Sprint("h", i), "l/x"), fileEntry(fmt.Sprint("l/.wh.", i), ""))
	}
	data := layerOf(t, list...)
	var b strings.Builder
	if _, err := Apply(t.Context(), t.TempDir(), strings.NewReader(string(data)), Options{Whiteouts: OverlayUser, Unresolved: &b}); err != nil {
		t.Fatal(err)
	}
	if b.Len() > len(data)*2+2<<20 {
		t.Errorf("%d bytes of a layer of %d", b.Len(), len(data))
	}
	all := records(t, []byte(b.String()))
	if last := all[len(all)-1]; last[0] != recordAgain {
		t.Errorf("it ends with %q", last)
	}
}
