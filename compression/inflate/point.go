package inflate

import "io"

// A Point is a place in a gzip stream at which decompression can begin.
type Point struct {
	// In is the offset in the compressed stream, in bits.
	In int64
	// Out is the offset in the plain stream.
	Out int64
	// AtMember reports that the header of a member comes next. Else a block of DEFLATE does.
	AtMember bool
	// Window is what the plain stream has before Out, up to 32 KiB of it. Bytes that nothing refers to are zeros.
	Window []byte
}

// points finds the points of a stream.
type points struct {
	next func(out int64) bool
	give func(Point)

	pending *Point
	isUsed  [windowSize]bool // bytes of the pending point's window that something refers to
}

// NewIndexer returns a Reader of r that calls give with points of the stream, in order. At each possible place it asks next whether one is
// wanted there.
func NewIndexer(r io.Reader, next func(out int64) bool, give func(Point)) *Reader {
	z := NewReader(r)
	z.d.points = &points{next: next, give: give}
	return z
}

// NewReaderAt returns a Reader of the stream from a point on. r begins with the byte that p.In is in. The checksum of
// the first member is not verified, unless the point is at its header.
func NewReaderAt(r io.Reader, p Point) (*Reader, error) {
	z := NewReader(r)
	d := &z.d
	z.any = true
	if p.AtMember {
		return z, nil
	}
	z.member, z.part = true, true
	d.w = copy(d.out, p.Window[max(0, len(p.Window)-windowSize):])
	d.read = d.w
	_, err := d.take(uint(p.In & 7))
	return z, err
}

func (p *points) member(d *decoder) {
	if out := d.gone + int64(d.w); p.next(out) {
		p.give(Point{In: 8 * (d.base + int64(d.pos)), Out: out, AtMember: true})
	}
}

func (p *points) block(d *decoder) {
	p.settle(d)
	out := d.gone + int64(d.w)
	if p.pending != nil || !p.next(out) {
		return
	}
	window := d.out[max(d.begin, d.w-windowSize):d.w]
	p.pending = &Point{In: 8*(d.base+int64(d.pos)) - int64(d.nb), Out: out, Window: append([]byte{}, window...)}
	clear(p.isUsed[:])
}

// reach notes that a match of some bytes, to be written at d.out[w], refers back.
func (p *points) reach(d *decoder, back, length int) {
	if p.pending == nil {
		return
	}
	// Counted from the window's end.
	from := int(d.gone+int64(d.w)-p.pending.Out) - back
	for i := from; i < min(from+length, 0); i++ {
		p.isUsed[windowSize+i] = true
	}
}

// settle gives the pending point once nothing can refer to its window any more.
func (p *points) settle(d *decoder) {
	if p.pending != nil && d.gone+int64(d.w)-p.pending.Out >= windowSize {
		p.end()
	}
}

// end gives the pending point.
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
	p.give(*p.pending)
	p.pending = nil
}
