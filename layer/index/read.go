package index

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"io"
	"sort"

	"distkit/compression"
	"distkit/compression/inflate"
	"distkit/layer"
)

// A Source returns the bytes of the compressed layer in [from, to).
type Source func(ctx context.Context, from, to int64) (io.ReadCloser, error)

// Files reads files that follow each other in a layer, in one pass. All data is verified against the digests in the
// index before it is returned.
type Files struct {
	plain *plain
	tar   *tar.Reader
	holes *layer.Holes
}

// Files starts to read the layer, from the entry first to the end of the entry last. holes is shared by all reads of
// the layer's files. ErrDataLoss: something is not as the index says. Errors of the source keep their class. The caller
// must call Close.
func (x *Index) Files(ctx context.Context, layerBytes Source, first, last Place, holes *layer.Holes) (*Files, error) {
	r, err := x.plain(ctx, layerBytes, first.Begin, last.End)
	if err != nil {
		return nil, err
	}
	return &Files{r, tar.NewReader(r), holes}, nil
}

// Next selects the entry to read. The layer's entry must equal want, the index's. Entries must be selected in the order
// of the archive. Errors are those of [Index.Files].
func (f *Files) Next(want *tar.Header, at Place) error {
	for {
		h, err := f.tar.Next()
		switch {
		case err == io.EOF:
			return dataLoss("the layer ends before %.200q", want.Name)
		case err != nil:
			return f.plain.cause(err)
		case f.plain.given < at.Content:
			continue
		case f.plain.given > at.Content || h.Name != want.Name || h.Size != want.Size || h.Typeflag != want.Typeflag || h.Linkname != want.Linkname:
			return dataLoss("the layer has %.200q where the index has %.200q", h.Name, want.Name)
		}
		return nil
	}
}

// Read reads the content of the selected entry. InvalidArgument: files have too many holes.
func (f *Files) Read(p []byte) (int, error) {
	n, err := f.tar.Read(p)
	if err := f.holes.Add(n, f.plain.given); err != nil {
		return 0, err
	}
	return n, f.plain.cause(err)
}

// Close stops reading.
func (f *Files) Close() error { return f.plain.Close() }

// Extent returns the range of the compressed layer that must be read for an entry.
func (x *Index) Extent(at Place) (from, to int64) {
	_, point, last := x.span(at.Begin, at.End)
	return x.extent(point, last)
}

// span returns the first and last chunk with plain bytes in [from, to), and the last chunk up to the first where
// decompression can begin.
func (x *Index) span(from, to int64) (first, point, last int) {
	chunks := x.doc.Chunks
	behind := func(offset int64) int {
		return sort.Search(len(chunks), func(i int) bool { return chunks[i].Offset > offset })
	}
	first, last = behind(from)-1, behind(max(from, to-1))-1
	point = first
	if compression.Format(x.doc.Compression) != compression.None {
		point = x.points[sort.SearchInts(x.points, first+1)-1]
	}
	return first, point, last
}

// extent returns the range of the compressed layer for the chunks from point to last.
func (x *Index) extent(point, last int) (from, to int64) {
	chunks := x.doc.Chunks
	if compression.Format(x.doc.Compression) == compression.None {
		return chunks[point].Offset, x.end(last)
	}
	to = x.doc.Layer.Size
	if next := sort.SearchInts(x.points, last+1); next < len(x.points) {
		to = min(to, (chunks[x.points[next]].Bit+7)/8)
	}
	return chunks[point].Bit / 8, to
}

// plain reads chunks of the plain layer, and verifies each before it returns any of it.
type plain struct {
	x      *Index
	source io.ReadCloser
	in     *compression.Input
	r      io.Reader
	close  func()
	chunk  int
	from   int64 // the first byte to return
	to     int64
	given  int64 // the offset of the next byte to return
	buf    []byte
	rest   []byte
	err    error
}

func (x *Index) plain(ctx context.Context, layerBytes Source, from, to int64) (*plain, error) {
	if from < 0 || to < from || to > x.doc.Size {
		return nil, dataLoss("index: an entry is outside of the layer")
	}
	first, point, last := x.span(from, to)
	begin, end := x.extent(point, last)
	window, err := x.window(point)
	if err != nil {
		return nil, err
	}
	source, err := layerBytes(ctx, begin, end)
	if err != nil {
		return nil, err
	}
	p := &plain{x: x, source: source, in: &compression.Input{Reader: source}, close: func() {}, chunk: first, from: from, to: to, given: from}
	c := x.doc.Chunks[point]
	switch compression.Format(x.doc.Compression) {
	case compression.Gzip:
		p.r, err = inflate.NewReaderAt(p.in, inflate.Point{In: c.Bit, Out: c.Offset, AtMember: c.Member || point == 0, Window: window})
	case compression.Zstd:
		p.r, p.close, err = compression.NewReader(bufio.NewReader(p.in))
	default:
		p.r = p.in
	}
	if err == nil {
		_, err = io.CopyN(io.Discard, p.r, x.doc.Chunks[first].Offset-c.Offset)
	}
	if err != nil {
		err = p.classify(err)
		_ = p.Close()
		return nil, err
	}
	return p, nil
}

// classify gives a class to an error of a decompressor. Errors of the source keep theirs.
func (p *plain) classify(err error) error {
	if p.in.Err != nil {
		return p.in.Err
	}
	return dataLoss("the layer does not decompress from where the index says: %w", err)
}

// cause returns the error behind one that an archive's reader returned.
func (p *plain) cause(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	if p.err != nil && p.err != io.EOF {
		return p.err
	}
	return dataLoss("the layer has no entry where the index says: %w", err)
}

func (p *plain) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		if p.err == nil {
			p.err = p.next()
		}
		if p.err != nil {
			return 0, p.err
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	p.given += int64(n)
	return n, nil
}

// next reads and verifies the next chunk.
func (p *plain) next() error {
	if p.chunk >= len(p.x.doc.Chunks) || p.x.doc.Chunks[p.chunk].Offset >= p.to {
		return io.EOF
	}
	offset, n := p.x.doc.Chunks[p.chunk].Offset, p.x.end(p.chunk)-p.x.doc.Chunks[p.chunk].Offset
	if int64(cap(p.buf)) < n {
		p.buf = make([]byte, n)
	}
	p.buf = p.buf[:n]
	if _, err := io.ReadFull(p.r, p.buf); err != nil {
		return p.classify(err)
	}
	if sha256.Sum256(p.buf) != p.x.sums[p.chunk] {
		return dataLoss("bytes %d to %d of the plain layer are not those of the index", offset, offset+n-1)
	}
	p.rest = p.buf[max(0, p.from-offset):min(n, p.to-offset)]
	p.chunk++
	return nil
}

func (p *plain) Close() error {
	p.close()
	return p.source.Close()
}
