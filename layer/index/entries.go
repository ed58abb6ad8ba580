package index

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Entries reads the layer's entries from its index.
type Entries struct {
	ctx  context.Context
	r    gaps
	zstd *zstd.Decoder
	tar  *tar.Reader
	last int64 // end of the last entry
	n    int64
	want int64
}

// A Place is the position of an entry in the layer's archive.
type Place struct {
	Begin, Content, End int64
}

// Entries starts to read the entries. The caller must call Close.
func (x *Index) Entries(ctx context.Context) (*Entries, error) {
	section := io.NewSectionReader(x.entries, 0, x.entries.Size())
	z, err := zstd.NewReader(section, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	e := &Entries{ctx: ctx, zstd: z, want: x.doc.Entries}
	e.r = gaps{r: bufio.NewReaderSize(z, maxRecord), size: x.doc.Size, most: leastHeaders + maxDensity*section.Size()}
	e.tar = tar.NewReader(&e.r)
	return e, nil
}

// Close stops reading.
func (e *Entries) Close() { e.zstd.Close() }

// Next returns the next entry and its place, or io.EOF. Global headers are skipped. ErrDataLoss: the index is
// malformed.
func (e *Entries) Next() (*tar.Header, Place, error) {
	for {
		if err := e.ctx.Err(); err != nil {
			return nil, Place{}, err
		}
		begin := (e.last + 511) / 512 * 512
		h, err := e.tar.Next()
		if err == io.EOF && e.n != e.want {
			err = dataLoss("it has %d entries, not %d", e.n, e.want)
		}
		if err != nil {
			return nil, Place{}, e.classify(err)
		}
		content := e.r.at
		if err := e.r.fill(); err != nil && err != io.EOF {
			return nil, Place{}, e.classify(err)
		}
		p := Place{begin, content, content}
		if e.r.kept == 0 {
			p.End += e.r.gap
		}
		e.last = p.End
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e.n++
		return h, p, nil
	}
}

func (e *Entries) classify(err error) error {
	if err == io.EOF || err == nil {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return dataLoss("index: the list of entries ends too early")
	}
	return dataLoss("index: the list of entries: %w", err)
}

// gaps reads a layer without the data of its files. These are gaps, which read as zeros.
type gaps struct {
	r         *bufio.Reader
	kept, gap int64 // what is left of the current record
	at        int64
	size      int64 // size of the layer
	most      int64 // how many bytes of headers may still come
}

// fill ensures that the current record has at least a byte to read. At the end it returns io.EOF.
func (g *gaps) fill() error {
	for empty := 0; g.kept == 0 && g.gap == 0; empty++ {
		kept, err := binary.ReadUvarint(g.r)
		if err == io.EOF {
			if g.at != g.size {
				return io.ErrUnexpectedEOF
			}
			return io.EOF
		}
		if err != nil {
			return err
		}
		if kept > maxRecord || empty > 2 {
			return errors.New("a record is malformed")
		}
		g.kept = int64(kept)
		if g.kept == 0 {
			if err := g.readGap(); err != nil {
				return err
			}
		}
	}
	return nil
}

// readGap reads the gap after the kept bytes of a record.
func (g *gaps) readGap() error {
	gap, err := binary.ReadUvarint(g.r)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err == nil && gap > uint64(g.size-g.at) {
		err = errors.New("it is longer than the layer")
	}
	g.gap = int64(gap)
	return err
}

func (g *gaps) Read(p []byte) (int, error) {
	if err := g.fill(); err != nil {
		return 0, err
	}
	if g.kept == 0 {
		n := int(min(int64(len(p)), g.gap))
		clear(p[:n])
		g.gap -= int64(n)
		g.at += int64(n)
		return n, nil
	}
	n, err := g.r.Read(p[:min(int64(len(p)), g.kept)])
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	g.kept -= int64(n)
	g.at += int64(n)
	if g.most -= int64(n); g.most < 0 || g.at > g.size {
		return 0, errors.New("there are too many headers")
	}
	if err == nil && n > 0 && g.kept == 0 {
		err = g.readGap()
	}
	return n, err
}

// Seek lets tar skip the data of a file. It can only move forward.
func (g *gaps) Seek(n int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || n < 0 {
		return 0, errors.ErrUnsupported
	}
	for n > 0 {
		err := g.fill()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return 0, err
		}
		if g.kept > 0 {
			k, err := io.CopyN(io.Discard, g, min(n, g.kept))
			if err != nil {
				return 0, err
			}
			n -= k
			continue
		}
		k := min(n, g.gap)
		g.gap, g.at, n = g.gap-k, g.at+k, n-k
	}
	return g.at, nil
}
