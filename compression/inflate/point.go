package inflate

import "io"

// A Point is a position in a gzip stream at which decompression can start.
type Point struct {
	// In is the position in the compressed stream, in bits.
	In int64
	// Out is the position in the plain stream, in bytes.
	Out int64
	// AtMember reports whether a member's header comes next. Otherwise it is a DEFLATE block.
	AtMember bool
	// Window is the plain content before Out, up to 32 KiB. Bytes that the following content doesn't refer to are zero.
	Window []byte
}

// points tracks the points of a stream. A point is reported only once its window is known to be settled.
type points struct {
	wants  func(out int64) bool
	report func(Point)

	pending *Point
	isUsed  [windowSize]bool // the bytes of the pending point's window that a match refers to
}

// NewIndexer returns a Reader of r that calls report with points of the stream, in order. At each possible point it
// asks wants, with the position in the plain stream, whether to report it.
func NewIndexer(r io.Reader, wants func(out int64) bool, report func(Point)) *Reader {
	z := NewReader(r)
	z.d.points = &points{wants: wants, report: report}
	return z
}

// NewReaderAt returns a Reader of the stream from a point on. r begins with the byte that contains p.In. The checksum
// of the first member is not verified, unless the point is at its header.
func NewReaderAt(r io.Reader, p Point) (*Reader, error) {
	z := NewReader(r)
	d := &z.d
	z.found = true
	if p.AtMember {
		return z, nil
	}
	z.member, z.partial = true, true
	d.w = copy(d.out, p.Window[max(0, len(p.Window)-windowSize):])
	d.read = d.w
	_, err := d.take(uint(p.In & 7))
	return z, err
}

func (p *points) member(d *decoder) {
	if out := d.dropped + int64(d.w); p.wants(out) {
		p.report(Point{In: 8 * (d.base + int64(d.pos)), Out: out, AtMember: true})
	}
}

func (p *points) block(d *decoder) {
	p.reportSettled(d)
	out := d.dropped + int64(d.w)
	if p.pending != nil || !p.wants(out) {
		return
	}
	window := d.out[max(d.begin, d.w-windowSize):d.w]
	p.pending = &Point{In: 8*(d.base+int64(d.pos)) - int64(d.nb), Out: out, Window: append([]byte{}, window...)}
	clear(p.isUsed[:])
}

// markUsed notes which bytes of the pending point's window a match refers to. The match is about to be written at
// d.out[d.w].
func (p *points) markUsed(d *decoder, back, length int) {
	if p.pending == nil {
		return
	}
	// The position relative to the window's end.
	from := int(d.dropped+int64(d.w)-p.pending.Out) - back
	for i := from; i < min(from+length, 0); i++ {
		p.isUsed[windowSize+i] = true
	}
}

// reportSettled reports the pending point once no match can refer to its window any more.
func (p *points) reportSettled(d *decoder) {
	if p.pending != nil && d.dropped+int64(d.w)-p.pending.Out >= windowSize {
		p.end()
	}
}

// end reports the pending point.
func (p *points) end() {
	if p.pending == nil {
		return
	}
	w := p.pending.Window
	for i := range w {
		if !p.isUsed[windowSize-len(w)+i] {
			w[i] = 0
		}
	}
	p.report(*p.pending)
	p.pending = nil
}
