package remoteimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"distkit/errclass"
	"distkit/image/layerindex"
	"distkit/image/look"
	"distkit/layer/index"
	"distkit/remotes"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobs is a remote that records what is fetched.
type blobs struct {
	remotes.Remote
	content  map[digest.Digest][]byte
	lock     sync.Mutex
	requests int
	bytes    int
}

func (r *blobs) Fetch(_ context.Context, id string, hints ...string) (io.ReadCloser, error) {
	b, ok := r.content[digest.Digest(id)]
	if !ok {
		return nil, errclass.Errorf(errdefs.ErrNotFound, "%s", id)
	}
	for _, h := range hints {
		if s, ok := strings.CutPrefix(h, "range:"); ok {
			var from, to int
			if _, err := fmt.Sscanf(s, "%d-%d", &from, &to); err != nil {
				return nil, err
			}
			b = b[from : to+1]
		}
	}
	r.lock.Lock()
	defer r.lock.Unlock()
	r.requests++
	r.bytes += len(b)
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (r *blobs) Referrers(context.Context, digest.Digest, remotes.ReferrerFilter) iter.Seq2[v1.Descriptor, error] {
	return func(func(v1.Descriptor, error) bool) {}
}

func (r *blobs) put(b []byte) v1.Descriptor {
	if r.content == nil {
		r.content = map[digest.Digest][]byte{}
	}
	d := digest.FromBytes(b)
	r.content[d] = b
	return v1.Descriptor{Digest: d, Size: int64(len(b))}
}

// putLayer adds a layer of small files, compressed with zstd as a single frame: it can be decompressed only from its
// beginning.
func (r *blobs) putLayer(t *testing.T, files int) v1.Descriptor {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range files {
		body := fmt.Sprintf("file %d", i)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("f%d", i), Size: int64(len(body))}); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(w, body)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return r.put(z.EncodeAll(b.Bytes(), nil))
}

func (r *blobs) image(layers ...v1.Descriptor) *remoteImage {
	return &remoteImage{remote: r, cache: &cache{}, documents: map[string]document{}, layers: layers, diffIDs: func() []digest.Digest { return nil }}
}

// flags returns Flags with a value of --index.
func flags(index string) *Flags {
	unverified := false
	return &Flags{index: &index, unverified: &unverified}
}

func walk(t *testing.T, l look.Layer, only []int64) (contents []string) {
	t.Helper()
	err := l.Walk(t.Context(), only, func(n int64, h *tar.Header, content io.Reader) error {
		b, err := io.ReadAll(content)
		contents = append(contents, fmt.Sprintf("%d %s %s", n, h.Name, b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return contents
}

// A layer that can be decompressed only from its beginning is fetched once for any number of files.
func TestManyFiles(t *testing.T) {
	t.Parallel()
	r := &blobs{}
	d := r.putLayer(t, 5000)
	list, err := flags("").layers(t.Context(), r.image(d))
	if err != nil {
		t.Fatal(err)
	}
	all := walk(t, list[0], nil)
	if len(all) != 5000 || all[4999] != "4999 f4999 file 4999" {
		t.Fatalf("%d entries", len(all))
	}
	var odd []int64
	var want []string
	for n := int64(1); n < 5000; n += 2 {
		odd, want = append(odd, n), append(want, all[n])
	}
	*r = blobs{content: r.content}
	if got := walk(t, list[0], odd); !slices.Equal(got, want) {
		t.Errorf("%d files, not those that were asked for", len(got))
	}
	if r.requests != 1 || r.bytes > int(d.Size) {
		t.Errorf("%d requests for %d bytes of a layer of %d", r.requests, r.bytes, d.Size)
	}
	*r = blobs{content: r.content}
	files, err := look.Open(t.Context(), list, 0, "f7", "f4000", "none", "f8", "f7")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, p := range []string{"f4000", "f8", "f7"} {
		if err := files.Cat(t.Context(), p, &b); err != nil {
			t.Fatal(err)
		}
	}
	if b.String() != "file 4000file 8file 7" || r.requests != 1 {
		t.Errorf("%q by %d requests", b.String(), r.requests)
	}
}

// A layer that occurs twice in an image is fetched once.
func TestRepeatedLayer(t *testing.T) {
	t.Parallel()
	r := &blobs{}
	d, other := r.putLayer(t, 3), r.putLayer(t, 4)
	list, err := flags("").layers(t.Context(), r.image(d, other, d, d))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := look.Read(t.Context(), list, look.Options{}); err != nil || r.requests != 2 {
		t.Errorf("%d requests: %v", r.requests, err)
	}
	other.Digest = d.Digest
	if _, err := flags("").layers(t.Context(), r.image(d, other)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a layer of two sizes: %v", err)
	}
}

// The size of all indexes that strangers offer is bounded.
func TestBoundsOfIndexes(t *testing.T) {
	t.Parallel()
	r := &blobs{}
	var layers []v1.Descriptor
	for i := range 3 {
		layers = append(layers, r.putLayer(t, i+1))
	}
	for name, sizes := range map[string][]int64{"negative": {-1}, "large": {maxIndexes + 1}, "large together": {maxIndexes / 2, maxIndexes / 2, 1}, "another size": {1}} {
		m := v1.Manifest{ArtifactType: index.MediaType}
		for i, n := range sizes {
			d := r.put([]byte("no index"))
			d.MediaType, d.Size, d.Annotations = index.MediaType, n, map[string]string{layerindex.AnnotationLayer: string(layers[i].Digest)}
			m.Layers = append(m.Layers, d)
		}
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		listed := r.put(b)
		r.requests = 0
		_, err = flags(string(listed.Digest)).layers(t.Context(), r.image(layers...))
		if !errdefs.IsDataLoss(err) || (r.requests > 1) != (name == "another size") {
			t.Errorf("%s: %d requests, %v", name, r.requests, err)
		}
	}
}

// An index is kept in, and used from, a directory only if nobody else can write to either.
func TestCache(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", filepath.Join(dir, "cache"))
	r := &blobs{}
	d := r.putLayer(t, 3)
	path := openCache().path(d)
	read := func() (requests int) {
		t.Helper()
		img := r.image(d)
		img.cache = openCache()
		list, err := flags("").layers(t.Context(), img)
		if err != nil {
			t.Fatal(err)
		}
		r.requests = 0
		if _, err := look.Read(t.Context(), list, look.Options{}); err != nil {
			t.Fatal(err)
		}
		return r.requests
	}
	check := func(what string, want int) {
		t.Helper()
		if n := read(); n != want {
			t.Errorf("%s: %d requests, not %d", what, n, want)
		}
	}
	change := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check("the first time", 1)
	check("the second time", 0)
	change(os.Chmod(path, 0o622))
	check("an index that others may write", 1)
	check("a new one in its place", 0)
	change(os.Chmod(filepath.Join(dir, "cache"), 0o777))
	check("others may move the directory", 1)
	change(os.Chmod(filepath.Join(dir, "cache"), 0o755))
	check("they may not", 0)
	change(os.Truncate(path, 2000))
	if x := openCache().open(d); x != nil {
		t.Error("a damaged index is used")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("a damaged index is still there: %v", err)
	}

	// If nothing can be kept, files can still be read.
	change(os.Mkdir(path, 0o700))
	check("the index can't be renamed", 1)
	list, err := flags("").layers(t.Context(), r.image(d))
	change(err)
	l := list[0].Source.(*remoteLayer)
	l.index = (&cache{}).add(d, func(io.Writer) error { return os.ErrInvalid })
	if l.index != nil {
		t.Error("an index that was not written is used")
	}
	if got := walk(t, list[0], []int64{1}); !slices.Equal(got, []string{"1 f1 file 1"}) {
		t.Errorf("got %q", got)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files are left: %v", len(entries), err)
	}
}

// An index that turns out to be damaged while it is read is removed too.
func TestDamagedCache(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", filepath.Join(t.TempDir(), "cache"))
	r := &blobs{}
	d := r.putLayer(t, 300)
	img := r.image(d)
	img.cache = openCache()
	list, err := flags("").layers(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	walk(t, list[0], nil)
	path := img.cache.path(d)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte("\x28\xb5\x2f\xfd")) // offset of the entries
	b[at+40] ^= 0xff
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if list, err = flags("").layers(t.Context(), img); err != nil {
		t.Fatal(err)
	}
	if _, err := look.Read(t.Context(), list, look.Options{}); !errdefs.IsDataLoss(err) {
		t.Errorf("the index is damaged: %v", err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// If there is no index and the user agrees, a layer's own table of contents is used. Then a file takes one request for
// a part of the layer.
func TestTableOfContents(t *testing.T) {
	t.Parallel()
	r := &blobs{}
	var b bytes.Buffer
	var entries []string
	for i := range 100 {
		body := make([]byte, 20_000)
		_, _ = rand.Read(body)
		entries = append(entries, fmt.Sprintf(`{"type": "reg", "name": "f%d", "size": %d, "offset": %d, "digest": %q}`, i, len(body), b.Len(), digest.FromBytes(body)))
		if i == 0 {
			entries[0] = `{"type": "dir", "name": "d/"}` // no entry is at offset 0
		}
		w := gzip.NewWriter(&b)
		_, _ = w.Write(body)
		_ = w.Close()
	}
	at := b.Len()
	w := gzip.NewWriter(&b)
	archive := tar.NewWriter(w)
	table := `{"entries": [` + strings.Join(entries, ",") + `]}`
	if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "stargz.index.json", Size: int64(len(table))}); err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(archive, table)
	_, _ = archive.Close(), w.Close()
	fmt.Fprintf(&b, "\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00%016xSTARGZ\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00", at)
	d := r.put(b.Bytes())
	f := flags("")
	if list, err := f.layers(t.Context(), r.image(d)); err != nil || list[0].Source.(*remoteLayer).toc != nil {
		t.Errorf("the table is believed without --unverified: %v", err)
	}
	*f.unverified = true
	list, err := f.layers(t.Context(), r.image(d))
	if err != nil {
		t.Fatal(err)
	}
	r.requests, r.bytes = 0, 0
	files, err := look.Open(t.Context(), list, 0, "f50")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := files.Cat(t.Context(), "f50", &out); err != nil || out.Len() != 20_000 {
		t.Errorf("%d bytes: %v", out.Len(), err)
	}
	if r.requests != 1 || r.bytes > 100_000 {
		t.Errorf("%d requests for %d bytes of a layer of %d", r.requests, r.bytes, d.Size)
	}
	r.requests = 0
	if err := files.Tar(t.Context(), []string{"/"}, io.Discard); err != nil || r.requests > 6 {
		t.Errorf("all files by %d requests: %v", r.requests, err)
	}
	r.content[d.Digest] = slices.Clone(b.Bytes())
	copy(r.content[d.Digest][at/2:], make([]byte, 40_000))
	if err := files.Tar(t.Context(), []string{"/"}, io.Discard); !errdefs.IsDataLoss(err) {
		t.Errorf("the layer is damaged: %v", err)
	}
}

// The tables of contents of all layers are bounded together by their plain bytes, too: a few KB can be a huge table.
func TestManyTables(t *testing.T) {
	t.Parallel()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	table := w.EncodeAll([]byte(`{"entries": []}`+strings.Repeat(" ", 64<<20)), nil)
	r := &blobs{}
	var layers []v1.Descriptor
	size := 0
	for i := range 9 {
		d := r.put(append(fmt.Appendf(nil, "layer %d", i), table...))
		d.Annotations = map[string]string{"io.github.containers.zstd-chunked.manifest-position": fmt.Sprintf("7:%d:1:1", len(table))}
		layers, size = append(layers, d), size+int(d.Size)
	}
	f := flags("")
	*f.unverified = true
	for _, few := range [][]v1.Descriptor{layers[:2], layers[1:3]} {
		if _, err := f.layers(t.Context(), r.image(few...)); err != nil {
			t.Errorf("%d layers: %v", len(few), err)
		}
	}
	if _, err := f.layers(t.Context(), r.image(layers...)); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "together") {
		t.Errorf("layers of %d bytes, whose tables have 576 MiB: %v", size, err)
	}
}

// A layer below the one that has the file is not fetched.
func TestTopmostLayer(t *testing.T) {
	t.Parallel()
	r := &blobs{}
	lower, top := r.putLayer(t, 10), r.putLayer(t, 5)
	list, err := flags("").layers(t.Context(), r.image(lower, top))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path     string
		requests int
	}{{"f4", 1}, {"f9", 1}, {"f9", 0}} {
		r.requests = 0
		files, err := look.Open(t.Context(), list, 0, c.path)
		if err != nil || r.requests != c.requests {
			t.Fatalf("%s: %d requests, not %d: %v", c.path, r.requests, c.requests, err)
		}
		var b bytes.Buffer
		if err := files.Cat(t.Context(), c.path, &b); err != nil || b.String() != "file "+c.path[1:] {
			t.Errorf("%s: %q, %v", c.path, b.String(), err)
		}
	}
}
