package layer

import (
	"archive/tar"
	"context"
	"errors"
	"io"
)

// Plain reads the entries of a plain archive in a file, which must have been verified before. It reads the headers, but
// contents only on a call of Read.
type Plain struct {
	ctx   context.Context
	in    window
	tar   *tar.Reader
	holes Holes
}

// NewPlain returns a Plain of the archive in r.
func NewPlain(ctx context.Context, r io.ReaderAt) *Plain {
	p := &Plain{ctx: ctx, in: window{r: r, next: minWindow}}
	p.tar = tar.NewReader(&p.in)
	return p
}

// Next is like Next of a Reader.
func (p *Plain) Next() (*tar.Header, error) {
	for {
		if err := p.ctx.Err(); err != nil {
			return nil, err
		}
		h, err := p.tar.Next()
		if err != nil {
			return nil, p.classify(err)
		}
		if h.Typeflag != tar.TypeXGlobalHeader {
			return h, nil
		}
	}
}

// Read is like Read of a Reader.
func (p *Plain) Read(b []byte) (int, error) {
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := p.tar.Read(b)
	if err := p.holes.Add(n, p.in.offset); err != nil {
		return 0, err
	}
	return n, p.classify(err)
}

func (p *Plain) classify(err error) error {
	switch {
	case err == nil, err == io.EOF:
		return err
	case p.in.err != nil:
		return p.in.err
	}
	return dataLoss("read layer, near byte %d: %w", p.in.offset, err)
}

// Offset is like Offset of a Reader.
func (p *Plain) Offset() int64 { return p.in.offset }

const minWindow, maxWindow = 4 << 10, 256 << 10

// A window reads a file through a buffer that grows during sequential reading and shrinks after a skip. So an archive
// of small files is read as a whole, and of large files only the surroundings of each header.
type window struct {
	r            io.ReaderAt
	buffer       []byte // the bytes read last
	start        int64  // offset of buffer in the file
	offset, next int64  // the next byte to read, and the size of the next buffer
	err          error  // an error of reading the file, not of the archive's format
}

func (w *window) Read(b []byte) (int, error) {
	end := w.start + int64(len(w.buffer))
	if w.offset < w.start || w.offset >= end {
		if w.offset == end {
			w.next = min(2*w.next, maxWindow)
		} else {
			w.next = minWindow
		}
		if int64(cap(w.buffer)) < w.next {
			w.buffer = make([]byte, w.next)
		}
		n, err := w.r.ReadAt(w.buffer[:w.next], w.offset)
		w.buffer, w.start = w.buffer[:n], w.offset
		if n == 0 {
			if err != io.EOF {
				w.err = err
			}
			return 0, err
		}
	}
	n := copy(b, w.buffer[w.offset-w.start:])
	w.offset += int64(n)
	return n, nil
}

// Seek lets package tar skip contents.
func (w *window) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		w.offset = 0
	case io.SeekCurrent:
	default:
		return 0, errors.ErrUnsupported
	}
	w.offset += offset
	return w.offset, nil
}
