package inflate

import (
	"encoding/binary"
	"hash/crc32"
	"io"
)

// A Reader reads the plain content of a gzip stream: that of all its members, one after another.
type Reader struct {
	d       decoder
	member  bool // inside a member
	found   bool // a member has been read
	partial bool // the member was not read from its beginning, so its checksum can't be verified
	crc     uint32
	size    uint32
	err     error
}

// NewReader returns a Reader of r. It reads ahead, even past the end of a member, so the position of r after an error
// is undefined. The stream ends at the end of r; anything else than another member before that is ErrHeader.
//
// Errors of r are returned unchanged. Input that ends early, or is empty, is io.ErrUnexpectedEOF.
func NewReader(r io.Reader) *Reader {
	return &Reader{d: decoder{
		r:   r,
		in:  make([]byte, inputSize),
		out: make([]byte, outputSize),
	}}
}

func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	d := &z.d
	for d.read == d.w {
		if z.err != nil {
			return 0, z.err
		}
		z.err = z.more()
	}
	n := copy(p, d.out[d.read:d.w])
	d.read += n
	return n, nil
}

// more decodes at least until the end of a member, or until the buffer is full. The caller has consumed all output
// before.
func (z *Reader) more() error {
	d := &z.d
	if !z.member {
		if err := z.header(); err != nil {
			return err
		}
		z.member, z.crc, z.size = true, 0, 0
		d.state, d.begin = atBlock, d.w
	}
	if len(d.out)-d.w < roomSize+outputSize/2 {
		kept := min(d.w, windowSize)
		dropped := d.w - kept
		copy(d.out, d.out[dropped:d.w])
		d.w, d.read, d.begin = kept, kept, max(d.begin-dropped, 0)
		d.dropped += int64(dropped)
	}
	err := d.run()
	fresh := d.out[d.read:d.w]
	z.crc = crc32.Update(z.crc, crc32.IEEETable, fresh)
	z.size += uint32(len(fresh))
	if err != nil || d.state != atEnd {
		return err
	}
	d.load(8)
	if d.end-d.pos < 8 {
		return d.short()
	}
	t := d.in[d.pos : d.pos+8]
	d.pos += 8
	partial := z.partial
	z.member, z.found, z.partial = false, true, false
	if !partial && (binary.LittleEndian.Uint32(t) != z.crc || binary.LittleEndian.Uint32(t[4:]) != z.size) {
		return ErrChecksum
	}
	return nil
}

// header reads the header of a member. io.EOF at the end of the stream.
func (z *Reader) header() error {
	d := &z.d
	d.load(10)
	if d.points != nil {
		d.points.end()
	}
	if d.pos == d.end && d.eof && d.err == nil && z.found {
		return io.EOF
	}
	if d.points != nil {
		d.points.member(d)
	}
	if d.end-d.pos < 10 {
		return d.short()
	}
	h := d.in[d.pos : d.pos+10]
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return ErrHeader
	}
	flags := h[3]
	crc := crc32.ChecksumIEEE(h)
	d.pos += 10
	skip := func(more func(b byte) bool) error {
		for {
			if d.load(1); d.pos == d.end {
				return d.short()
			}
			b := d.in[d.pos : d.pos+1]
			crc = crc32.Update(crc, crc32.IEEETable, b)
			d.pos++
			if !more(b[0]) {
				return nil
			}
		}
	}
	if flags&4 != 0 { // extra field
		n, size := 0, 2
		err := skip(func(b byte) bool {
			if n < 2 {
				size += int(b) << (8 * n)
			}
			n++
			return n < size
		})
		if err != nil {
			return err
		}
	}
	for _, f := range []byte{8, 16} { // name and comment
		if flags&f != 0 {
			if err := skip(func(b byte) bool { return b != 0 }); err != nil {
				return err
			}
		}
	}
	if flags&2 != 0 {
		want := uint16(crc)
		d.load(2)
		if d.end-d.pos < 2 {
			return d.short()
		}
		if binary.LittleEndian.Uint16(d.in[d.pos:]) != want {
			return ErrHeader
		}
		d.pos += 2
	}
	return nil
}
