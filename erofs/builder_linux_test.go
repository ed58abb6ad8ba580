package erofs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"distkit/archive"
	"distkit/layer/tree"
)

type tarEntry struct {
	tar.Header
	body string
}

func file(name, body string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body}
}

func dir(name string) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, ""}
}

func xattr(e tarEntry, name, value string) tarEntry {
	if e.PAXRecords == nil {
		e.PAXRecords = map[string]string{}
	}
	e.PAXRecords["SCHILY.xattr."+name] = value
	return e
}

// pack writes a plain layer.
func pack(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size, h.Format = int64(len(e.body)), tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1486094706, 123456789)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// build makes an image of layers. It also returns what the image can't hold.
func build(t testing.TB, opts Options, layers ...[]byte) ([]byte, map[string]int64, error) {
	t.Helper()
	opts.Scratch = t.TempDir()
	b := NewBuilder(opts)
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(opts.Scratch); err != nil || len(left) > 0 {
			t.Errorf("temporary files are left: %v, %v", left, err)
		}
	}()
	for _, l := range layers {
		if err := b.Add(t.Context(), bytes.NewReader(l), ""); err != nil {
			return nil, nil, err
		}
	}
	var image bytes.Buffer
	err := b.Write(t.Context(), &image)
	return image.Bytes(), b.Unset(), err
}

// judge checks an image with fsck.erofs, if that is installed.
func judge(t testing.TB, image []byte, devices ...[]byte) {
	t.Helper()
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		return
	}
	dir := t.TempDir()
	var args []string
	for i, d := range append(devices, image) {
		p := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(p, d, 0o600); err != nil {
			t.Fatal(err)
		}
		if i < len(devices) {
			p = "--device=" + p
		}
		args = append(args, p)
	}
	if out, err := exec.Command(fsck, args...).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v: %s", err, out)
	}
}

// show makes a complete image and an index of plain layers, checks that both show the same files, and returns these.
func show(t testing.TB, layers ...[]byte) []string {
	t.Helper()
	whole, _, err := build(t, Options{}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := read(whole)
	if err != nil {
		t.Fatal(err)
	}
	judge(t, whole)
	index, _, err := build(t, Options{Index: true}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	others, err := read(index, layers...)
	if err != nil {
		t.Fatalf("index: %v", err)
	}
	judge(t, index, layers...)
	if !slices.Equal(lines, others) {
		t.Errorf("the index shows other files:\n%s\nthan the complete image:\n%s", strings.Join(others, "\n"), strings.Join(lines, "\n"))
	}
	judgeExt4(t, Options{}, 0, layers...)
	if others := showArchive(t, Options{}, layers...); !slices.Equal(lines, others) {
		t.Errorf("the archive shows other files:\n%s\nthan the complete image:\n%s", strings.Join(others, "\n"), strings.Join(lines, "\n"))
	}
	return lines
}

// showArchive writes the layers with WriteTar, and returns the files of an image of that archive.
func showArchive(t testing.TB, opts Options, layers ...[]byte) []string {
	t.Helper()
	opts.Scratch = t.TempDir()
	b := NewBuilder(opts)
	defer b.Close()
	for _, l := range layers {
		if err := b.Add(t.Context(), bytes.NewReader(l), ""); err != nil {
			t.Fatal(err)
		}
	}
	var archives [2]bytes.Buffer
	for i := range archives {
		if err := b.WriteTar(t.Context(), &archives[i], TarOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0].Bytes(), archives[1].Bytes()) {
		t.Error("a second archive differs")
	}
	image, unset, err := build(t, Options{}, archives[0].Bytes())
	if err != nil || len(unset) > 0 {
		t.Fatalf("an image of the archive: %v, without %v", err, unset)
	}
	lines, err := read(image)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// Directories whose entries take a little less or more than whole blocks, with names of all lengths, and files of such
// sizes.
func TestSizes(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	var entries []tarEntry
	for n := 0; n < 300; n += 7 {
		d := fmt.Sprintf("d%d", n)
		entries = append(entries, dir(d))
		for i := range n {
			entries = append(entries, file(fmt.Sprintf("%s/%03d%s", d, i, strings.Repeat("x", r.IntN(maxName-2))), strings.Repeat("y", n*17+i)))
		}
	}
	for i := range 40 {
		entries = append(entries, tarEntry{tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprint("l", i), Linkname: strings.Repeat("z/", 51*i+1)}, ""})
	}
	if lines := show(t, pack(t, entries...)); len(lines) != len(entries) {
		t.Errorf("%d files, not %d", len(lines), len(entries))
	}
}

// The memory for a directory of 100,000 files is proportional to their number, and all of it counts against the limit.
func TestWideDirectory(t *testing.T) {
	const n = 100000
	entries := []tarEntry{dir("d")}
	for i := range n {
		entries = append(entries, file(fmt.Sprintf("d/%d", i*7919%n), ""))
	}
	layer := pack(t, entries...)
	b := NewBuilder(Options{Index: true})
	defer b.Close()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if err := b.Add(t.Context(), bytes.NewReader(layer), ""); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	for most, is := range map[int64]func(error) bool{used: errdefs.IsFailedPrecondition, 160 * (n + 2): func(err error) bool { return err == nil }} {
		if _, _, err := build(t, Options{Index: true, MaxMemory: most}, layer); !is(err) {
			t.Errorf("%d files take %d bytes of memory, with a limit of %d: %v", n, used, most, err)
		}
	}
	var image bytes.Buffer
	if err := b.Write(t.Context(), &image); err != nil {
		t.Fatal(err)
	}
	lines, err := read(image.Bytes(), layer)
	if err != nil || len(lines) != n+1 {
		t.Errorf("%d files: %v", len(lines), err)
	}
}

// Directories may be as deep as a path can be long. fsck.erofs 1.8 crashes on such images.
func TestDeepDirectories(t *testing.T) {
	t.Parallel()
	image, _, err := build(t, Options{}, pack(t, file(strings.Repeat("d/", 2000)+"f", "x")))
	if err != nil {
		t.Fatal(err)
	}
	if lines, err := read(image); err != nil || len(lines) != 2001 {
		t.Errorf("%d files: %v", len(lines), err)
	}
}

// Sparse files are stored without their holes, whatever the size of these.
func TestSparseFiles(t *testing.T) {
	t.Parallel()
	holes, err := os.ReadFile("testdata/sparse.tar")
	if err != nil {
		t.Fatal(err)
	}
	lines := show(t, holes)
	root := t.TempDir()
	if _, err := archive.Apply(t.Context(), root, bytes.NewReader(holes), archive.Options{}); err != nil {
		t.Fatal(err)
	}
	applied := dump(t, root)
	if !slices.Equal(lines, applied) {
		t.Errorf("the image shows\n%s\nwhere there is\n%s", strings.Join(lines, "\n"), strings.Join(applied, "\n"))
	}
	image, _, err := build(t, Options{}, holes)
	if err != nil || len(image) > 256<<10 {
		t.Errorf("the image has %d bytes: %v", len(image), err)
	}
}

// The same layers make the same image, whatever their compression.
func TestSameLayersMakeTheSameImage(t *testing.T) {
	t.Parallel()
	var entries []tarEntry
	for i := range 1000 {
		entries = append(entries, xattr(xattr(file(fmt.Sprint("d/", i*37%1000), "x"), "user.b", "1"), "user.a", "2"))
	}
	layer := pack(t, entries...)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(layer); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	first, _, err := build(t, Options{}, layer)
	if err != nil {
		t.Fatal(err)
	}
	second, _, err := build(t, Options{}, packed.Bytes())
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("the images differ: %v", err)
	}
	other, _, err := build(t, Options{}, layer, layer)
	if err != nil || bytes.Equal(first[superOffset+48:superOffset+64], other[superOffset+48:superOffset+64]) {
		t.Errorf("images of other layers have the same UUID: %v", err)
	}
}

// Data of files that a higher layer hides are not in the image.
func TestHiddenDataAreLeftOut(t *testing.T) {
	t.Parallel()
	secret := strings.Repeat("secret", 2000)
	image, _, err := build(t, Options{}, pack(t, file("d/a", secret), file("b", secret)), pack(t, file("d/.wh..wh..opq", ""), file(".wh.b", ""), file("c", "x")))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(image, []byte("secret")) {
		t.Error("the image has data of files that are hidden")
	}
	if lines, err := read(image); err != nil || len(lines) != 2 {
		t.Errorf("got %q, %v", lines, err)
	}
}

func TestAttributesThatNoImageHolds(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("v", 60000)
	f := file("f", "")
	for i := range 6 {
		f = xattr(f, fmt.Sprint("user.", i), big)
	}
	f = xattr(f, "user.overlay.opaque", "y")
	f = xattr(f, "nothing.a", "1")
	f = xattr(f, "security.capability", "not one")
	f = xattr(f, "user.long", big+big)
	link := xattr(tarEntry{tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "f"}, ""}, "user.a", "1")
	image, unset, err := build(t, Options{}, pack(t, f, link, tarEntry{tar.Header{Typeflag: tar.TypeChar, Name: "null"}, ""}))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]int64{"user attributes": 4, "overlay attributes": 1, "other attributes": 1, "security attributes": 1, "devices": 1}
	if fmt.Sprint(unset) != fmt.Sprint(want) {
		t.Errorf("left out %v, not %v", unset, want)
	}
	judge(t, image)
	lines, err := read(image)
	if err != nil || len(lines) != 2 || strings.Count(lines[0], " user.") != 4 {
		t.Errorf("%d files: %v", len(lines), err)
	}
}

// The kinds that a report lists are fixed: a layer can neither choose their names nor make many.
func TestKindsOfAttributesAreFew(t *testing.T) {
	t.Parallel()
	f := file("f", "")
	for i := range 100 {
		f = xattr(f, fmt.Sprintf("\x1b]0;%d\a.x", i), "")
	}
	f = xattr(f, "system.x", "")
	f.PAXRecords["LIBARCHIVE.xattr.user.a%00security.capability"] = "MQ"
	image, unset, err := build(t, Options{}, pack(t, f))
	if err != nil {
		t.Fatal(err)
	}
	if want := "map[other attributes:100 system attributes:1 user attributes:1]"; fmt.Sprint(unset) != want {
		t.Errorf("left out %v, not %s", unset, want)
	}
	if bytes.Contains(image, []byte("security.capability")) {
		t.Error("the image holds an attribute whose name has a NUL")
	}
}

func TestSymbolicLinksHaveNoSetIDBits(t *testing.T) {
	t.Parallel()
	if got := show(t, pack(t, tarEntry{tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "f", Mode: 0o7644}, ""})); !strings.HasPrefix(got[0], "l 120777 ") {
		t.Errorf("got %q", got)
	}
}

// Inode numbers have 32 bits and grow with the addresses of sparse files' chunks, including holes. An image with too
// many is refused.
func TestTooManyInodes(t *testing.T) {
	t.Parallel()
	b := NewBuilder(Options{})
	defer b.Close()
	for i := range 65 { // of 2 GiB each
		c, err := b.tree.Apply(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i)})
		if err != nil {
			t.Fatal(err)
		}
		b.tree.File(c.Entry).size = 1 << 40
		if err := (&image{Builder: b, bits: blockBits, block: 1 << blockBits}).layout(1 << blockBits); i < 63 && err != nil || i == 64 && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%d files: got %v", i+1, err)
		}
		for _, e := range b.tree.Children(tree.Root, nil) {
			b.tree.File(e).slot = 0
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	layer := pack(t, file("a/b/c", "x"), file("d", "y"))
	for name, test := range map[string]struct {
		opts Options
		is   func(error) bool
	}{
		"bytes":           {Options{MaxBytes: 1024}, errdefs.IsFailedPrecondition},
		"entries":         {Options{MaxEntries: 3}, errdefs.IsFailedPrecondition},
		"enough entries":  {Options{MaxEntries: 4}, func(err error) bool { return err == nil }},
		"memory":          {Options{MaxMemory: 300}, errdefs.IsFailedPrecondition},
		"enough of all":   {Options{MaxMemory: 3000, MaxBytes: int64(len(layer))}, func(err error) bool { return err == nil }},
		"memory of names": {Options{MaxMemory: 450}, errdefs.IsFailedPrecondition},
	} {
		if _, _, err := build(t, test.opts, layer); !test.is(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestBadLayers(t *testing.T) {
	t.Parallel()
	good := pack(t, file("f", "x"))
	for name, test := range map[string]struct {
		layer []byte
		is    func(error) bool
	}{
		"nothing":         {nil, errdefs.IsDataLoss},
		"no layer":        {[]byte(strings.Repeat("not a layer", 100)), errdefs.IsDataLoss},
		"no end":          {good[:1024], errdefs.IsDataLoss},
		"cut":             {good[:700], errdefs.IsDataLoss},
		"xz":              {[]byte("\xfd7zXZ\x00 and more that is not read"), errdefs.IsNotImplemented},
		"long name":       {pack(t, file(strings.Repeat("n", maxName+1), "")), errdefs.IsInvalidArgument},
		"long path":       {pack(t, file(strings.Repeat("n/", 2048)+"f", "")), errdefs.IsInvalidArgument},
		"file for a dir":  {pack(t, file("f", ""), file("f/g", "")), errdefs.IsInvalidArgument},
		"link to nothing": {pack(t, tarEntry{tar.Header{Typeflag: tar.TypeLink, Name: "l", Linkname: "f"}, ""}), errdefs.IsInvalidArgument},
		"link loop":       {pack(t, tarEntry{tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "l"}, ""}, file("l/f", "")), errdefs.IsInvalidArgument},
		"owner":           {pack(t, tarEntry{tar.Header{Typeflag: tar.TypeDir, Name: "d", Uid: 1<<32 - 1}, ""}), errdefs.IsInvalidArgument},
	} {
		if _, _, err := build(t, Options{}, test.layer); !test.is(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	b := NewBuilder(Options{})
	defer b.Close()
	if err := b.Add(t.Context(), bytes.NewReader(good), digest.FromString("another")); !errdefs.IsDataLoss(err) {
		t.Errorf("another diff ID: got %v", err)
	}
}

// If a temporary file can't be written, Add fails: the image must not silently lack data.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	b := NewBuilder(Options{})
	defer b.Close()
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b.plain = full
	if err := b.Add(t.Context(), bytes.NewReader(pack(t, file("f", "x"))), ""); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("got %v", err)
	}
}
