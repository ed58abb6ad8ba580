package toc

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
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// member compresses as one gzip member.
func member(b string) string {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = io.WriteString(w, b)
	_ = w.Close()
	return out.String()
}

// blob makes an eStargz layer: a member of content, the table, and the footer.
func blob(t *testing.T, content, table string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "stargz.index.json", Size: int64(len(table))})
	if err == nil {
		_, err = io.WriteString(w, table)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	head := "0123456789" + member(content)
	return head + member(b.String()) + fmt.Sprintf("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00%016xSTARGZ\x01\x00\x00\xff\xff", len(head)) + strings.Repeat("\x00", 8)
}

// firstFile opens the content of a layer's first file.
func firstFile(t *testing.T, table *Table, source Source) *Contents {
	t.Helper()
	e, err := table.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	_, chunks, err := e.Next()
	if err != nil {
		t.Fatal(err)
	}
	contents := table.Contents(t.Context(), source)
	t.Cleanup(func() { contents.Close() })
	contents.Open(chunks, false)
	return contents
}

func find(t *testing.T, b string, annotations map[string]string) (*Table, Source, error) {
	t.Helper()
	source := func(_ context.Context, from, to int64) (io.ReadCloser, error) {
		if from < 0 || from > to || to > int64(len(b)) {
			t.Errorf("bytes %d to %d of %d are asked for", from, to, len(b))
			return nil, errdefs.ErrInvalidArgument
		}
		return io.NopCloser(strings.NewReader(b[from:to])), nil
	}
	table, err := Find(t.Context(), v1.Descriptor{Size: int64(len(b)), Annotations: annotations}, source, &Budget{}, func() (*os.File, error) {
		return os.Create(filepath.Join(t.TempDir(), "table"))
	})
	if table != nil {
		t.Cleanup(table.Close)
	}
	return table, source, err
}

func TestFiles(t *testing.T) {
	t.Parallel()
	sum := digest.FromString("fghij")
	table := `{"version": 1, "other": [{"a": 1}], "entries": [
		{"type": "dir", "name": "d/", "mode": 493},
		{"type": "reg", "name": "d/a", "size": 5, "offset": 10, "xattrs": {"user.x": "AGI="}},
		{"type": "reg", "name": "d/b", "size": 7, "offset": 10, "innerOffset": 5, "chunkSize": 5, "chunkDigest": "` + string(sum) + `"},
		{"type": "chunk", "name": "d/b", "offset": 10, "innerOffset": 10, "chunkOffset": 5},
		{"type": "reg", "name": "d/empty", "modtime": "2020-01-02T03:04:05Z"}]}`
	b := blob(t, "abcdefghijkl", table)
	for _, annotations := range []map[string]string{nil, {annotationDigest: string(digest.FromString(table))}} {
		found, source, err := find(t, b, annotations)
		if err != nil || found == nil {
			t.Fatalf("%v, %v", found, err)
		}
		e, err := found.Entries(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		contents := found.Contents(t.Context(), source)
		defer contents.Close()
		got := ""
		for {
			h, chunks, err := e.Next()
			if err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			contents.Open(chunks, true)
			content, err := io.ReadAll(contents)
			if err != nil {
				t.Error(err)
			}
			got += fmt.Sprintf("%s %c %d %q;", h.Name, h.Typeflag, len(h.PAXRecords), content)
		}
		if want := `d/ 5 0 "";d/a 0 1 "abcde";d/b 0 0 "fghijkl";d/empty 0 0 "";`; got != want {
			t.Errorf("got %s, not %s", got, want)
		}
	}
	if _, _, err := find(t, b, map[string]string{annotationDigest: string(sum)}); !errdefs.IsDataLoss(err) {
		t.Errorf("another digest: %v", err)
	}
	for _, none := range []string{"", "x", member("plain"), b[:len(b)-1]} {
		if found, _, err := find(t, none, nil); found != nil || err != nil {
			t.Errorf("a layer of %d bytes without a table: %v, %v", len(none), found, err)
		}
	}
}

// A table can't do more than fail.
func TestMalformed(t *testing.T) {
	t.Parallel()
	file := func(more string) string {
		return `{"entries": [{"type": "reg", "name": "f", "size": 5, ` + more + `}]}`
	}
	for name, table := range map[string]string{
		"no JSON":                   `x`,
		"an array":                  `[]`,
		"no entries":                `{"version": 1}`,
		"entries are none":          `{"entries": {}}`,
		"cut short":                 `{"entries": [{"type": "dir"}`,
		"an unknown type":           `{"entries": [{"type": "socket"}]}`,
		"a chunk of no file":        `{"entries": [{"type": "chunk"}]}`,
		"a negative size":           `{"entries": [{"type": "reg", "size": -1}]}`,
		"a huge size":               `{"entries": [{"type": "reg", "size": 9000000000000000000, "offset": 10}]}`,
		"no offset":                 file(`"mode": 1`),
		"a chunk at another place":  file(`"offset": 10, "chunkOffset": 1`),
		"a negative offset":         file(`"offset": -1`),
		"an offset behind":          file(`"offset": 100000`),
		"a negative inner offset":   file(`"offset": 10, "innerOffset": -1`),
		"a huge inner offset":       file(`"offset": 10, "innerOffset": 9000000000000000000`),
		"a chunk that is too large": file(`"offset": 10, "chunkSize": 6`),
		"a negative chunk":          file(`"offset": 10, "chunkSize": -1`),
		"a chunk is missing":        file(`"offset": 10, "chunkSize": 3`),
		"a malformed digest":        file(`"offset": 10, "digest": "sha256:x"`),
		"a huge entry":              `{"entries": [{"type": "dir", "name": "` + strings.Repeat("n", maxValue+64<<10) + `"}]}`,
		"a huge other value":        `{"other": "` + strings.Repeat("n", maxValue+64<<10) + `", "entries": []}`,
	} {
		if found, _, err := find(t, blob(t, "abcdefghijkl", table), nil); found != nil || !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v, %v", name, found, err)
		}
	}
	for _, at := range []string{"", "1", "1:2:3", "-5:10:10:1", "10:-1:1:1", "10:99999999999:1:1", "9223372036854775807:10:1:1", "0:10:10:1", "1:2:3:4:5", "a:b:c:d", "10:5:5:1"} {
		if found, _, err := find(t, blob(t, "abc", `{"entries": []}`), map[string]string{prefixes[0] + manifestPosition: at}); found != nil || !errdefs.IsDataLoss(err) {
			t.Errorf("position %q: %v, %v", at, found, err)
		}
	}
	for name, c := range map[string]struct {
		content, entry string
	}{
		"the stream is shorter":       {"abc", `"offset": 10`},
		"it ends before the file":     {"abc", `"offset": 10, "innerOffset": 9`},
		"nothing decompresses there":  {"abcdefghijkl", `"offset": 12`},
		"the content has another sum": {"abcdefghijkl", `"offset": 10, "digest": "` + string(digest.FromString("fghij")) + `"`},
	} {
		found, source, err := find(t, blob(t, c.content, file(c.entry)), nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		contents := firstFile(t, found, source)
		b, err := io.ReadAll(contents)
		if !errdefs.IsDataLoss(err) || errors.Is(err, io.EOF) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if n, again := contents.Read(make([]byte, 1)); n != 0 || again == nil || again.Error() != err.Error() {
			t.Errorf("%s: read again: %d, %v, not %v", name, n, again, err)
		}
	}
}

// The first stream of a layer begins at offset 0.
func TestFirstStream(t *testing.T) {
	t.Parallel()
	const table = `{"entries": [{"type": "reg", "name": "f", "size": 5, "innerOffset": 2}]}`
	first := member("abcdefghi")
	b := first + blob(t, "", table)[10:]
	b = b[:len(b)-51] + fmt.Sprintf("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00%016xSTARGZ\x01\x00\x00\xff\xff", len(first)+len(member(""))) + strings.Repeat("\x00", 8)
	found, source, err := find(t, b, nil)
	if err != nil || found == nil {
		t.Fatalf("%v, %v", found, err)
	}
	contents := firstFile(t, found, source)
	if b, err := io.ReadAll(contents); err != nil || string(b) != "cdefg" {
		t.Errorf("%q, %v", b, err)
	}
}

// chunked makes a zstd:chunked layer and its annotations: streams, and the table.
func chunked(t *testing.T, streams []byte, table string) (string, map[string]string) {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	packed := w.EncodeAll([]byte(table), nil)
	return string(streams) + string(packed), map[string]string{prefixes[0] + manifestPosition: fmt.Sprintf("%d:%d:%d:1", len(streams), len(packed), len(table))}
}

// zstd reads a stream ahead while the next file is opened.
func TestZstd(t *testing.T) {
	t.Parallel()
	const files, size = 64, 100_000
	plain := make([]byte, files*size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(plain)
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var entries []string
	for i := range files {
		entries = append(entries, fmt.Sprintf(`{"type": "reg", "name": "f%d", "size": %d, "offset": 10, "innerOffset": %d}`, i, size, i*size))
	}
	b, annotations := chunked(t, w.EncodeAll(plain, []byte("0123456789")), `{"entries": [`+strings.Join(entries, ",")+`]}`)
	found, read, err := find(t, b, annotations)
	if err != nil || found == nil {
		t.Fatalf("%v, %v", found, err)
	}
	e, err := found.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	contents := found.Contents(t.Context(), read)
	defer contents.Close()
	for i := range files {
		_, chunks, err := e.Next()
		if err != nil {
			t.Fatal(err)
		}
		contents.Open(chunks, i < files-1)
		if b, err := io.ReadAll(contents); err != nil || !bytes.Equal(b, plain[i*size:][:size]) {
			t.Fatalf("file %d: %d bytes, %v", i, len(b), err)
		}
	}
}

// A table that names few places very often takes little memory.
func TestFewPlaces(t *testing.T) {
	t.Parallel()
	const pairs = 100_000
	table := `{"entries": [` + strings.Repeat(`{"type":"reg","size":1,"offset":1},{"type":"reg","size":1,"offset":2},`, pairs) + `{"type":"dir"}]}`
	b, annotations := chunked(t, []byte("0123456789"), table)
	found, _, err := find(t, b, annotations)
	if err != nil || found == nil {
		t.Fatalf("%v, %v", found, err)
	}
	if len(found.offsets) != 2 || cap(found.offsets) > 16 {
		t.Errorf("%d offsets in room for %d, from a layer of %d bytes", len(found.offsets), cap(found.offsets), len(b))
	}
}
