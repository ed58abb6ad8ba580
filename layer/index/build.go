package index

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"

	"distkit/compression"
	"distkit/compression/inflate"
	"distkit/layer"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// A Builder reads a layer and makes its index. It needs little memory: data that grow with the layer are in temporary
// files.
type Builder struct {
	in      *layer.Reader
	layer   *counter
	tap     tap
	scratch [2]*os.File
}

// NewBuilder starts to read a layer, plain or compressed with gzip or zstd. known is the layer's digest if r verifies
// that; if it is "", the Builder computes it. Temporary files are made in dir, or in os.TempDir if dir is "". The
// caller must call Close.
func NewBuilder(ctx context.Context, r io.Reader, known digest.Digest, dir string) (*Builder, error) {
	b := &Builder{layer: &counter{r: r, known: known}}
	if known == "" {
		b.layer.hash = sha256.New()
	}
	for i := range b.scratch {
		f, err := os.CreateTemp(dir, ".dist-index-")
		if err == nil {
			b.scratch[i], err = f, os.Remove(f.Name())
		}
		if err != nil {
			b.closeScratch()
			return nil, fmt.Errorf("temporary file: %w", err)
		}
	}
	b.tap = tap{windows: newWindows(b.scratch[0]), headers: newHeaders(b.scratch[1]), hash: sha256.New()}
	b.in = layer.NewIndexer(ctx, b.layer, &b.tap)
	return b, nil
}

// Next returns the next entry of the layer, or io.EOF: see [layer.Reader].
func (b *Builder) Next() (*tar.Header, error) {
	h, err := b.in.Next()
	if err == nil {
		b.tap.entries++
	}
	return h, err
}

// Read reads the content of the entry that Next returned last.
func (b *Builder) Read(p []byte) (int, error) { return b.in.Read(p) }

// End reads the rest of the layer. It fails if expect is not "" and the layer has another diff ID. If expect is "", the
// layer must have an end-of-archive marker: otherwise it may have been cut short.
func (b *Builder) End(expect digest.Digest) error {
	for {
		if _, err := b.Next(); err == io.EOF {
			return b.in.End(expect)
		} else if err != nil {
			return err
		}
	}
}

// Write writes the index to w. It may be called only after End.
func (b *Builder) Write(w io.Writer) error {
	t := &b.tap
	diffID, size := b.in.DiffID(), b.in.Size() // the goroutines have ended
	t.cut()
	t.place()
	if err := t.headers.end(size); err != nil {
		return fmt.Errorf("temporary file: %w", err)
	}
	if err := t.windows.end(); err != nil {
		return fmt.Errorf("temporary file: %w", err)
	}
	if len(t.chunks) > maxChunks {
		return fmt.Errorf("layer has more than %d chunks", maxChunks)
	}
	doc, err := json.Marshal(document{
		Version: 1, Layer: blob{string(b.layer.digest()), b.layer.n}, DiffID: string(diffID), Size: size,
		Compression: string(t.format), Entries: t.entries, Chunks: t.chunks,
	})
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	for _, f := range []struct {
		name string
		size int64
		copy func() error
	}{
		{documentName, int64(len(doc)), func() error { _, err := out.Write(doc); return err }},
		{windowsName, t.windows.size, func() error { return copyFile(out, b.scratch[0]) }},
		{entriesName, t.headers.file.size, func() error { return copyFile(out, b.scratch[1]) }},
	} {
		if err := out.WriteHeader(&tar.Header{Format: tar.FormatUSTAR, Name: f.name, Mode: 0o644, Size: f.size}); err != nil {
			return err
		}
		if err := f.copy(); err != nil {
			return err
		}
	}
	return out.Close()
}

// Layer returns the layer's digest and size. It may be called only after End.
func (b *Builder) Layer() (digest.Digest, int64) { return b.layer.digest(), b.layer.n }

func copyFile(w io.Writer, f *os.File) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	_, err := io.Copy(w, f)
	return err
}

// Close stops reading and removes the temporary files.
func (b *Builder) Close() {
	b.in.Close()
	_ = b.tap.headers.zstd.Close()
	b.closeScratch()
}

func (b *Builder) closeScratch() {
	for _, f := range b.scratch {
		if f != nil {
			_ = f.Close()
		}
	}
}

// counter counts and hashes the compressed layer.
type counter struct {
	r     io.Reader
	n     int64
	hash  hash.Hash // nil if the digest is known
	known digest.Digest
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.hash != nil {
		c.hash.Write(p[:n])
	}
	return n, err
}

func (c *counter) digest() digest.Digest {
	if c.hash != nil {
		return digest.NewDigest(digest.SHA256, c.hash)
	}
	return c.known
}

// A tap collects what the layer's reader reports. Wants and Add are called by the goroutine that decompresses, Write by
// the one that hashes, and Header by the caller's.
type tap struct {
	format  compression.Format
	windows *windows
	headers *headers
	entries int64

	mu     sync.Mutex
	begun  bool
	last   int64 // offset of the last chunk that Wants has chosen
	bounds []int64
	points []point // ordered by offset

	chunks []chunk
	offset int64 // offset of the next byte for Write
	hash   hash.Hash
}

type point struct {
	inflate.Point
	window int64
}

func (t *tap) Begin(f compression.Format) { t.format = f }

// Wants reports whether a new chunk should begin at an offset where decompression can begin. Write makes the same
// decision.
func (t *tap) Wants(out int64) bool {
	for out > t.last+stretch*distance(t.last) {
		t.last += stretch * distance(t.last)
	}
	if out < t.last+distance(t.last) && (out > 0 || t.begun) {
		return false
	}
	t.last, t.begun = out, true
	if out > 0 {
		t.mu.Lock()
		t.bounds = append(t.bounds, out)
		t.mu.Unlock()
	}
	return true
}

func (t *tap) Add(p inflate.Point) {
	n := t.windows.add(p.Window)
	p.Window = nil
	t.mu.Lock()
	t.points = append(t.points, point{p, n})
	t.mu.Unlock()
}

// Write divides the plain bytes into chunks, and hashes each.
func (t *tap) Write(p []byte) (n int, err error) {
	n = len(p)
	for len(p) > 0 {
		begin := int64(0)
		if k := len(t.chunks); k > 0 {
			begin = t.chunks[k-1].Offset
		}
		next := begin + stretch*distance(begin)
		if t.format == compression.None {
			next = begin + distance(begin)
		}
		t.mu.Lock()
		if len(t.bounds) > 0 {
			next = min(next, t.bounds[0])
		}
		if t.offset == next && len(t.bounds) > 0 && t.bounds[0] == next {
			t.bounds = t.bounds[1:]
		}
		t.mu.Unlock()
		if len(t.chunks) == 0 {
			t.chunks = []chunk{{}}
			continue
		}
		if t.offset == next {
			t.cut()
			t.chunks = append(t.chunks, chunk{Offset: next})
			continue
		}
		k := min(int64(len(p)), next-t.offset)
		t.hash.Write(p[:k])
		t.offset += k
		p = p[k:]
	}
	return n, nil
}

// cut ends the current chunk.
func (t *tap) cut() {
	if k := len(t.chunks); k > 0 {
		t.chunks[k-1].SHA256 = hex.EncodeToString(t.hash.Sum(nil))
		t.hash.Reset()
	}
}

// place sets in the chunks where decompression can begin. A point at the end of the layer belongs to no chunk.
func (t *tap) place() {
	i := 0
	for _, p := range t.points {
		for i < len(t.chunks) && t.chunks[i].Offset < p.Out {
			i++
		}
		if i < len(t.chunks) && t.chunks[i].Offset == p.Out {
			c := &t.chunks[i]
			c.Bit, c.Member, c.Window = p.In, p.AtMember, p.window
		}
	}
}

func (t *tap) Header(offset int64, b []byte) { t.headers.add(offset, b) }

// windows writes windows, each compressed separately.
type windows struct {
	file *bufio.Writer
	zstd *zstd.Encoder
	size int64
}

func newWindows(f *os.File) *windows {
	z, _ := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithWindowSize(maxWindow), zstd.WithLowerEncoderMem(true))
	return &windows{file: bufio.NewWriter(f), zstd: z}
}

func (w *windows) add(window []byte) int64 {
	if len(window) == 0 {
		return 0
	}
	b := w.zstd.EncodeAll(window, nil)
	_, _ = w.file.Write(b) // end returns the error
	w.size += int64(len(b))
	return int64(len(b))
}

func (w *windows) end() error { return w.file.Flush() }

// headers writes the layer without the data of files, as records: the length of the kept bytes, these, and the length
// of the gap after them.
type headers struct {
	file *sized
	zstd *zstd.Encoder
	kept []byte
	at   int64 // offset after the kept bytes
	err  error
}

type sized struct {
	w    io.Writer
	size int64
}

func (s *sized) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.size += int64(n)
	return n, err
}

func newHeaders(f *os.File) *headers {
	s := &sized{w: f}
	z, _ := zstd.NewWriter(s, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20), zstd.WithLowerEncoderMem(true))
	return &headers{file: s, zstd: z}
}

func (h *headers) add(offset int64, b []byte) {
	if offset > h.at {
		h.record(offset - h.at)
	}
	h.at = offset + int64(len(b))
	for len(h.kept)+len(b) >= maxRecord {
		k := maxRecord - len(h.kept)
		h.kept = append(h.kept, b[:k]...)
		b = b[k:]
		h.record(0)
	}
	h.kept = append(h.kept, b...)
}

func (h *headers) record(gap int64) {
	var frame [2 * binary.MaxVarintLen64]byte
	begin := binary.PutUvarint(frame[:], uint64(len(h.kept)))
	for _, b := range [][]byte{frame[:begin], h.kept, binary.AppendUvarint(frame[:0:0], uint64(gap))} {
		if h.err == nil {
			_, h.err = h.zstd.Write(b)
		}
	}
	h.kept = h.kept[:0]
}

// end writes the last record of a layer with size plain bytes.
func (h *headers) end(size int64) error {
	h.record(size - h.at)
	if err := h.zstd.Close(); h.err == nil {
		h.err = err
	}
	return h.err
}
