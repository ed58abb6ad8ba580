package index

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"distkit/layer"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

type holes = layer.Holes // many tests have a variable called layer

// archive returns a layer with entries of many kinds, and the content of its files by name.
func archive(t testing.TB, files, size int) ([]byte, map[string]string) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, uint64(files)))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	contents := map[string]string{}
	add := func(h *tar.Header, content string) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			contents[h.Name] = content
		}
	}
	add(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, "")
	add(&tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755}, "")
	for i := range files {
		var s strings.Builder
		for n := rnd.IntN(2*size + 1); s.Len() < n; {
			fmt.Fprintf(&s, "line %d %x\n", rnd.IntN(100), rnd.Uint64())
		}
		add(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d/file-%d", i), Mode: 0o644}, s.String())
		if i%7 == 0 {
			add(&tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprintf("d/link-%d", i), Linkname: "file-0"}, "")
		}
		if i%5 == 0 {
			add(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d/%s-%d", strings.Repeat("long", 60), i), PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}, "long")
		}
	}
	add(&tar.Header{Typeflag: tar.TypeReg, Name: "last"}, "the last one")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), contents
}

func gzipped(t testing.TB, level int, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil || w.Close() != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstandard(t testing.TB, plain []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(plain, nil)
}

func build(t testing.TB, layer []byte) []byte {
	t.Helper()
	b, err := NewBuilder(t.Context(), bytes.NewReader(layer), "", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var out bytes.Buffer
	if err := errors.Join(b.End(""), b.Write(&out)); err != nil {
		t.Fatal(err)
	}
	if d, n := b.Layer(); d != digest.FromBytes(layer) || n != int64(len(layer)) {
		t.Errorf("the layer is said to be %s, %d bytes", d, n)
	}
	return out.Bytes()
}

// source returns a Source for a layer that counts the bytes read.
func source(layer []byte, count *int64) Source {
	return func(_ context.Context, from, to int64) (io.ReadCloser, error) {
		*count += to - from
		return io.NopCloser(bytes.NewReader(layer[from:to])), nil
	}
}

// files reads all regular files of a layer with its index.
func files(ctx context.Context, x *Index, s Source, each func(name, content string)) error {
	e, err := x.Entries(ctx)
	if err != nil {
		return err
	}
	defer e.Close()
	holes := &holes{}
	for {
		h, at, err := e.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		r, err := x.Files(ctx, s, at, at, holes)
		if err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		err = r.Next(h, at)
		var content []byte
		if err == nil {
			content, err = io.ReadAll(r)
		}
		_ = r.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		each(h.Name, string(content))
	}
}

// An index lists the layer's entries, and each file can be read by ranges, whatever the compression.
func TestFiles(t *testing.T) {
	t.Parallel()
	plain, contents := archive(t, 60, 60<<10)
	for name, layer := range map[string][]byte{
		"plain": plain, "gzip": gzipped(t, 6, plain), "fast": gzipped(t, 1, plain), "stored": gzipped(t, 0, plain), "zstd": zstandard(t, plain),
		"members": append(gzipped(t, 6, plain[:2<<20]), gzipped(t, 9, plain[2<<20:])...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := build(t, layer)
			if again := build(t, layer); !bytes.Equal(b, again) {
				t.Error("two indexes of a layer differ")
			}
			x, err := Open(bytes.NewReader(b), int64(len(b)))
			if err != nil {
				t.Fatal(err)
			}
			if d, n := x.Layer(); d != digest.FromBytes(layer) || n != int64(len(layer)) || digest.Digest(x.doc.DiffID) != digest.FromBytes(plain) {
				t.Errorf("of layer %s, %d bytes, diff ID %s", d, n, digest.Digest(x.doc.DiffID))
			}
			if len(x.doc.Chunks) < 2 && name != "zstd" {
				t.Errorf("%d chunks", len(x.doc.Chunks))
			}
			want := []string{}
			for r := tar.NewReader(bytes.NewReader(plain)); ; {
				h, err := r.Next()
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if h.Typeflag != tar.TypeXGlobalHeader {
					want = append(want, fmt.Sprintf("%+v", *h))
				}
			}
			e, err := x.Entries(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer e.Close()
			for i := 0; ; i++ {
				h, _, err := e.Next()
				if err == io.EOF && i == len(want) {
					break
				}
				if err != nil || i >= len(want) || fmt.Sprintf("%+v", *h) != want[i] {
					t.Fatalf("entry %d of %d is %+v: %v", i, len(want), h, err)
				}
			}
			n, read := 0, int64(0)
			if err := files(t.Context(), x, source(layer, &read), func(name, content string) {
				if n++; contents[name] != content {
					t.Errorf("%s has %d bytes of %d", name, len(content), len(contents[name]))
				}
			}); err != nil || n != len(contents) {
				t.Errorf("%d files of %d: %v", n, len(contents), err)
			}
			if most := int64(n) * int64(len(layer)) * 3 / 4; name != "zstd" && read > most {
				t.Errorf("%d bytes of the layer were read for %d files", read, n)
			}
		})
	}
}

// A sparse file has the same content as when read from the layer.
func TestSparseFile(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	// GNU's format 1.0: the map precedes the data.
	data := "1\n1048576\n4\n" + strings.Repeat("\x00", 512-12) + "tail"
	w := tar.NewWriter(&b)
	h := &tar.Header{Typeflag: tar.TypeReg, Name: "GNUSparseFile.0/f", Size: int64(len(data)), Mode: 0o644, Format: tar.FormatPAX}
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(w, data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	records := ""
	for _, kv := range []string{"GNU.sparse.major=1\n", "GNU.sparse.minor=0\n", "GNU.sparse.name=f\n", "GNU.sparse.realsize=1048580\n"} {
		records += fmt.Sprintf("%d %s", len(kv)+3, kv)
	}
	var pax bytes.Buffer
	w = tar.NewWriter(&pax)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "PaxHeaders.0/f", Size: int64(len(records)), Format: tar.FormatUSTAR}); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(w, records)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	head := pax.Bytes()
	head[156] = 'x'
	layer := append(checksum(head, 0), b.Bytes()...)
	index := build(t, layer)
	x, err := Open(bytes.NewReader(index), int64(len(index)))
	if err != nil {
		t.Fatal(err)
	}
	var got string
	n := int64(0)
	if err := files(t.Context(), x, source(layer, &n), func(_, content string) { got += content }); err != nil {
		t.Fatal(err)
	}
	if want := strings.Repeat("\x00", 1<<20) + "tail"; got != want {
		t.Errorf("%d bytes, not %d", len(got), len(want))
	}
	e, err := x.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	h, at, err := e.Next()
	if err != nil {
		t.Fatal(err)
	}
	holes := &holes{}
	if err := holes.Add(1<<40, 1<<40); err != nil {
		t.Fatal(err)
	}
	r, err := x.Files(t.Context(), source(layer, &n), at, at, holes)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Next(h, at); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); !errdefs.IsInvalidArgument(err) {
		t.Errorf("after holes of 1 TiB: %v", err)
	}
}

// An index is small compared to its layer, even if that has many small files.
func TestSizeOfIndex(t *testing.T) {
	t.Parallel()
	plain, _ := archive(t, 100, 100<<10)
	layer := gzipped(t, 6, plain)
	if b := build(t, layer); len(b) > len(layer)/100 {
		t.Errorf("the index has %d bytes, the layer %d", len(b), len(layer))
	}
}

// If the layer differs from its index, that is detected before any of its bytes are returned.
func TestOtherLayer(t *testing.T) {
	t.Parallel()
	plain, contents := archive(t, 40, 100<<10)
	b := build(t, plain)
	x, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(plain)
	at := bytes.Index(bad, []byte("the last one"))
	bad[at] = 'T'
	n := int64(0)
	err = files(t.Context(), x, source(bad, &n), func(name, content string) {
		if contents[name] != content || name == "last" {
			t.Errorf("%s was given", name)
		}
	})
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "are not those of the index") {
		t.Error(err)
	}
	fail := errors.New("gone")
	err = files(t.Context(), x, func(context.Context, int64, int64) (io.ReadCloser, error) { return nil, fail }, func(string, string) {})
	if !errors.Is(err, fail) {
		t.Error(err)
	}
}

// FuzzOpen reads indexes that are damaged or belong to another layer. Whatever they claim, a file's content is the one
// that the layer has under that name.
func FuzzOpen(f *testing.F) {
	plain, contents := archive(f, 12, 4<<10)
	layers := [][]byte{plain, gzipped(f, 6, plain), zstandard(f, plain)}
	for _, layer := range layers {
		b := build(f, layer)
		f.Add(b)
		rnd := rand.New(rand.NewPCG(7, 8))
		for range 40 {
			bad := bytes.Clone(b)
			bad[rnd.IntN(len(bad))] ^= 1 << rnd.IntN(8)
			f.Add(bad)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			if !errdefs.IsDataLoss(err) {
				t.Fatal(err)
			}
			return
		}
		for _, layer := range layers {
			if _, n := x.Layer(); n != int64(len(layer)) {
				continue
			}
			n := int64(0)
			err := files(t.Context(), x, source(layer, &n), func(name, content string) {
				if contents[name] != content {
					t.Fatalf("%q has %d bytes of %d", name, len(content), len(contents[name]))
				}
			})
			if err != nil && !errdefs.IsDataLoss(err) {
				t.Fatal(err)
			}
		}
	})
}

// BenchmarkBuild makes an index of the layer in the file BENCH_LAYER, or else of a sample. Speeds are in compressed
// bytes.
func BenchmarkBuild(b *testing.B) {
	plain, _ := archive(b, 300, 300<<10)
	layer := gzipped(b, 6, plain)
	if p := os.Getenv("BENCH_LAYER"); p != "" {
		var err error
		if layer, err = os.ReadFile(p); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(len(layer)))
	for b.Loop() {
		x, err := NewBuilder(b.Context(), bytes.NewReader(layer), "", b.TempDir())
		if err != nil {
			b.Fatal(err)
		}
		if err := errors.Join(x.End(""), x.Write(io.Discard)); err != nil {
			b.Fatal(err)
		}
		x.Close()
	}
}

// Sizes and records that no valid index has are DataLoss.
func TestMalformedIndex(t *testing.T) {
	t.Parallel()
	plain, _ := archive(t, 3, 100)
	good := build(t, plain)
	at := 512 + int(mustSize(t, good[124:136])+511)/512*512 // offset of the header of windows
	for at += 512; !bytes.HasPrefix(good[at:], []byte(entriesName)); at += 512 {
	}
	huge := bytes.Clone(good)
	huge[at+124] = 0x80 // in base 256
	copy(huge[at+125:at+136], "\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xfe\x00")
	var long bytes.Buffer
	w := tar.NewWriter(&long)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("x", 2<<20), Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string][]byte{"a size beyond all files": checksum(huge, at), "a name of 2 MiB": long.Bytes()} {
		if _, err := Open(bytes.NewReader(b), int64(len(b))); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func mustSize(t *testing.T, octal []byte) (n int64) {
	t.Helper()
	if _, err := fmt.Sscanf(string(octal[:11]), "%o", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// checksum sets the checksum of a header.
func checksum(b []byte, at int) []byte {
	copy(b[at+148:at+156], "        ")
	sum := 0
	for _, c := range b[at : at+512] {
		sum += int(c)
	}
	copy(b[at+148:at+156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}
