package remotes

import (
	"io"

	"github.com/containerd/errdefs"
)

func errReadOnce() error {
	return classf(errdefs.ErrAborted, "the content can be read only once, but has to be sent again: put it again")
}

// window reads content, and keeps at least the last keep bytes of it.
type window struct {
	content io.Reader
	keep    int64
	step    int64 // how much is dropped at a time
	buf     []byte
	start   int64 // offset of buf in the content
	err     error // the error that ended reading, or io.EOF
}

func (w *window) end() int64 { return w.start + int64(len(w.buf)) }

// more reads some bytes, or sets err.
func (w *window) more() {
	limit := int(w.keep + w.step)
	if len(w.buf) >= limit {
		w.buf = w.buf[:copy(w.buf, w.buf[w.step:])]
		w.start += w.step
	}
	if len(w.buf) == cap(w.buf) {
		size := limit // the system allocates only pages that are written
		if cap(w.buf) == 0 {
			size = min(limit, smallBlob)
		}
		grown := make([]byte, len(w.buf), size)
		copy(grown, w.buf)
		w.buf = grown
	}
	n, err := w.content.Read(w.buf[len(w.buf):cap(w.buf)])
	w.buf, w.err = w.buf[:len(w.buf)+n], err
}

// windowReader reads content of known size through a window. It returns the last byte only when the content has ended
// there.
type windowReader struct {
	*window
	offset, size int64
}

func (r *windowReader) Read(p []byte) (int, error) {
	if r.offset < r.start {
		return 0, errReadOnce()
	}
	for r.err == nil && (r.end() == r.offset || r.end() == r.size) {
		r.more()
	}
	switch {
	case r.err != nil && r.err != io.EOF:
		return 0, r.err
	case r.end() > r.size || r.err == io.EOF && r.end() < r.size:
		return 0, classf(errdefs.ErrDataLoss, "size mismatch: got %s or more, not %d", sizeString(r.end()), r.size)
	case r.offset == r.size:
		return 0, io.EOF
	}
	n := copy(p, r.buf[r.offset-r.start:])
	r.offset += int64(n)
	return n, nil
}
