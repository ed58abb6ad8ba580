package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/containers/storage/pkg/chunked/compressor"
	"github.com/klauspost/compress/zstd"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"distkit/layer"
	"distkit/layer/toc"
)

// allKinds makes a layer with files of all kinds: many small files, a large one that can't be compressed, and one of
// zeros.
func allKinds(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write := func(h tar.Header, content []byte) {
		t.Helper()
		h.Size, h.ModTime, h.Uid, h.Gid = int64(len(content)), time.Unix(1700000000, 0), 7, 8
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	large := make([]byte, 9<<20)
	_, _ = rand.Read(large)
	write(tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o1777}, nil)
	for i := range 300 {
		write(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("d/f%d", i), Mode: 0o4755}, []byte(strings.Repeat(fmt.Sprint("file ", i), i)))
	}
	write(tar.Header{Typeflag: tar.TypeReg, Name: "d/large", PAXRecords: map[string]string{layer.XattrRecord + "user.a": "\x00b"}}, large)
	write(tar.Header{Typeflag: tar.TypeReg, Name: "d/zeros"}, make([]byte, 3<<20))
	write(tar.Header{Typeflag: tar.TypeSymlink, Name: "d/link", Linkname: "f7"}, nil)
	write(tar.Header{Typeflag: tar.TypeLink, Name: "d/hard", Linkname: "d/f7"}, nil)
	write(tar.Header{Typeflag: tar.TypeChar, Name: "d/dev", Devmajor: 5, Devminor: 1}, nil)
	write(tar.Header{Typeflag: tar.TypeReg, Name: "d/.wh.gone"}, nil)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// makers are the libraries that make such layers, with the annotations that they add.
var makers = map[string]func(plain []byte) ([]byte, map[string]string, error){
	"estargz":           func(b []byte) ([]byte, map[string]string, error) { return stargz(b) },
	"estargz min chunk": func(b []byte) ([]byte, map[string]string, error) { return stargz(b, estargz.WithMinChunkSize(100_000)) },
	"estargz min chunk, a prioritized file": func(b []byte) ([]byte, map[string]string, error) {
		return stargz(b, estargz.WithMinChunkSize(100_000), estargz.WithPrioritizedFiles([]string{"d/f7", "d/f150"}))
	},
	"estargz small chunks": func(b []byte) ([]byte, map[string]string, error) { return stargz(b, estargz.WithChunkSize(1<<20)) },
	"stargz zstd": func(b []byte) ([]byte, map[string]string, error) {
		more := map[string]string{}
		blob, annotations, err := stargz(b, estargz.WithCompression(struct {
			*zstdchunked.Compressor
			*zstdchunked.Decompressor
		}{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: more}, &zstdchunked.Decompressor{}}))
		maps.Copy(annotations, more)
		return blob, annotations, err
	},
	"containers zstd:chunked": func(b []byte) ([]byte, map[string]string, error) {
		var out bytes.Buffer
		annotations := map[string]string{}
		w, err := compressor.ZstdCompressor(&out, annotations, nil)
		if err == nil {
			_, err = w.Write(b)
			err = errors.Join(err, w.Close())
		}
		return out.Bytes(), annotations, err
	},
}

func stargz(b []byte, options ...estargz.Option) ([]byte, map[string]string, error) {
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b))), options...)
	if err != nil {
		return nil, nil, err
	}
	defer blob.Close()
	packed, err := io.ReadAll(blob)
	return packed, map[string]string{estargz.TOCJSONDigestAnnotation: blob.TOCDigest().String()}, err
}

// Layers made by other projects' libraries are read by their table of contents, with annotations or without. The result
// is the same as reading the archive.
func TestTablesOfContents(t *testing.T) {
	t.Parallel()
	plain := allKinds(t)
	for name, build := range makers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			blob, annotations, err := build(plain)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range []map[string]string{annotations, nil} {
				readByTable(t, plain, blob, a)
			}
			for key := range annotations {
				wrong := maps.Clone(annotations)
				last := wrong[key][len(wrong[key])-1]
				wrong[key] = wrong[key][:len(wrong[key])-1] + string("10"[b2i(last == '1')])
				if strings.HasSuffix(key, "-position") || strings.Contains(key, "tarsplit") {
					continue
				}
				d := v1.Descriptor{Size: int64(len(blob)), Annotations: wrong}
				if _, err := toc.Find(t.Context(), d, source(blob, nil), &toc.Budget{}, scratch(t)); !errdefs.IsDataLoss(err) {
					t.Errorf("%s is wrong: %v", key, err)
				}
			}
		})
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func source(blob []byte, requests *[]int64) toc.Source {
	return func(_ context.Context, from, to int64) (io.ReadCloser, error) {
		if from < 0 || to > int64(len(blob)) || from > to {
			return nil, fmt.Errorf("range %d to %d of %d", from, to, len(blob))
		}
		if requests != nil {
			*requests = append(*requests, to-from)
		}
		return io.NopCloser(bytes.NewReader(blob[from:to])), nil
	}
}

func scratch(t *testing.T) func() (*os.File, error) {
	dir := t.TempDir()
	return func() (*os.File, error) { return os.Create(filepath.Join(dir, "table")) }
}

func readByTable(t *testing.T, plain, blob []byte, annotations map[string]string) {
	t.Helper()
	var requests []int64
	read := source(blob, &requests)
	table, err := toc.Find(t.Context(), v1.Descriptor{Size: int64(len(blob)), Annotations: annotations}, read, &toc.Budget{}, scratch(t))
	if err != nil || table == nil {
		t.Fatalf("%v: %v, %v", annotations, table, err)
	}
	defer table.Close()
	type file struct {
		h      *tar.Header
		chunks []toc.Chunk
	}
	files := map[string]file{}
	e, err := table.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var order []string
	for {
		h, chunks, err := e.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		files[layer.Clean(h.Name)] = file{h, chunks}
		order = append(order, layer.Clean(h.Name))
	}

	// One small file needs one request.
	requests = nil
	contents := table.Contents(t.Context(), read)
	contents.Open(files["d/f150"].chunks, false)
	if b, err := io.ReadAll(contents); err != nil || string(b) != strings.Repeat("file 150", 150) {
		t.Errorf("%q, %v", b, err)
	}
	contents.Close()
	if len(requests) != 1 || requests[0] > 400_000 {
		t.Errorf("a small file took requests of %d bytes", requests)
	}

	// All small files together need a few requests.
	requests = nil
	contents = table.Contents(t.Context(), read)
	defer contents.Close()
	found := 0
	want := map[string]*tar.Header{}
	bodies := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		want[layer.Clean(h.Name)] = h
		bodies[layer.Clean(h.Name)], _ = io.ReadAll(r)
	}
	for _, name := range order {
		f, h := files[name], want[name]
		if h == nil {
			continue // a landmark file
		}
		found++
		xattrs, err := layer.Xattrs(f.h.PAXRecords)
		wanted, _ := layer.Xattrs(h.PAXRecords)
		if err != nil || f.h.Typeflag != h.Typeflag || f.h.Mode != h.Mode || f.h.Uid != 7 || f.h.Gid != 8 || f.h.Size != h.Size || f.h.Devmajor != h.Devmajor ||
			f.h.Devminor != h.Devminor || f.h.Linkname != h.Linkname || !f.h.ModTime.Equal(h.ModTime) || len(xattrs) != len(wanted) || fmt.Sprint(xattrs) != fmt.Sprint(wanted) {
			t.Errorf("%s: got %+v, %v, not %+v", name, f.h, err, h)
		}
		contents.Open(f.chunks, true)
		if b, err := io.ReadAll(contents); err != nil || !bytes.Equal(b, bodies[name]) {
			t.Errorf("%s: %d bytes, not the %d of the archive: %v", name, len(b), len(bodies[name]), err)
		}
	}
	if found != len(want) {
		t.Errorf("the table has %d files, not %d", found, len(want))
	}
	if len(requests) > 20 {
		t.Errorf("all files took %d requests", len(requests))
	}

	// Bytes that differ from those in the table are refused.
	large := files["d/large"].chunks
	damaged := slices.Clone(blob)
	damaged[large[0].Offset+500_000] ^= 1
	contents = table.Contents(t.Context(), source(damaged, nil))
	defer contents.Close()
	contents.Open(large, false)
	if _, err := io.Copy(io.Discard, contents); !errdefs.IsDataLoss(err) {
		t.Errorf("a damaged layer: %v", err)
	}
}
