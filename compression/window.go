package compression

import (
	"bufio"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"
)

// LargeWindow is the largest zstd window that needs no permission. It is the limit that RFC 8878 recommends to writers;
// clients of registries write smaller ones.
const LargeWindow = 8 << 20

// windows passes a zstd stream on, and calls large once, before the header of the first frame with a window larger than
// LargeWindow. It doesn't validate the stream: whatever it can't parse goes to the decoder unchanged.
type windows struct {
	r      *bufio.Reader
	large  func() error // nil after the call
	left   uint64       // bytes of the current header or block still to pass on
	blocks bool         // the next header is that of a block
	sum    uint64       // size of the checksum after the last block
}

func (w *windows) Read(p []byte) (int, error) {
	if w.left == 0 {
		if err := w.next(); err != nil {
			return 0, err
		}
	}
	n, err := w.r.Read(p[:min(uint64(len(p)), w.left)])
	w.left -= uint64(n)
	return n, err
}

// next determines the length of the next header or block.
func (w *windows) next() error {
	w.left = math.MaxUint64 // if the header can't be parsed
	if w.blocks {
		b, err := w.r.Peek(3)
		if err != nil {
			return ended(b, err)
		}
		header := uint64(b[0]) | uint64(b[1])<<8 | uint64(b[2])<<16
		last, kind, size := header&1 == 1, header>>1&3, header>>3
		if kind == 1 { // an RLE block: one byte, repeated
			size = 1
		}
		w.left = 3 + size
		if last {
			w.left, w.blocks = w.left+w.sum, false
		}
		return nil
	}
	b, err := w.r.Peek(zstd.HeaderMaxSize)
	if len(b) == 0 {
		return err
	}
	var h zstd.Header
	if h.Decode(b) != nil {
		return nil
	}
	w.left = uint64(h.HeaderSize)
	if h.Skippable {
		w.left += uint64(h.SkippableSize)
		return nil
	}
	w.blocks, w.sum = true, 0
	if h.HasCheckSum {
		w.sum = 4
	}
	if h.SingleSegment {
		h.WindowSize = h.FrameContentSize
	}
	if large := w.large; large != nil && h.WindowSize > LargeWindow {
		w.large = nil
		return large()
	}
	return nil
}

// ended returns nil if some bytes are left, which the decoder will report as an error.
func ended(left []byte, err error) error {
	if err == io.EOF && len(left) > 0 {
		return nil
	}
	return err
}
