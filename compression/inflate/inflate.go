// Package inflate decompresses gzip streams (RFC 1952), about twice as fast as compress/flate and its descendants, in
// plain memory-safe Go.
//
// [NewReader] returns a Reader of a whole stream. [NewIndexer] also reports each [Point] at which decompression can
// start later, and [NewReaderAt] starts there.
//
// The decoder is as strict as compress/flate about DEFLATE streams (RFC 1951): codes must be complete, or a single code
// of one bit; distances must stay inside the output; lengths of stored blocks must match their complement. Output
// before an error is returned before the error.
//
// Why it is fast:
//
//   - A bit buffer of 64 bits is refilled without a branch.
//   - One table look-up per symbol gives everything about it.
//   - One refill serves several literals.
//   - Matches are copied in pieces of 16 bytes, which may go past their end.
//   - The output buffer is flat, so the inner loop checks for space once per round.
//
// The inner loop needs some bytes of input ahead; a slow loop decodes the last ones.
//
// Errors are [ErrHeader], [ErrChecksum], [ErrCorrupt], io.ErrUnexpectedEOF, or those of the underlying reader.
package inflate

import (
	"encoding/binary"
	"errors"
	"io"
)

var (
	// ErrHeader is the error of a stream, or of data after a member, that doesn't begin with a valid gzip header.
	ErrHeader = errors.New("gzip: invalid header")
	// ErrChecksum is the error of a member with a wrong CRC-32 or length.
	ErrChecksum = errors.New("gzip: invalid checksum")
	// ErrCorrupt is the error of an invalid DEFLATE stream.
	ErrCorrupt = errors.New("deflate: corrupt data")
)

const (
	windowSize = 32 << 10
	maxMatch   = 258
	slack      = 32 // how far past its end a match may write
	inputSize  = 128 << 10
	outputSize = windowSize + 512<<10 + maxMatch + slack
	fastInput  = 32                   // more input than one round of the fast loop may read
	roomSize   = maxMatch + slack + 3 // what one round of the fast loop may write

	litBits  = 11
	distBits = 9
	// Complete codes of 288 and 32 symbols with up to 15 bits need at most 2342 and 594 entries, as zlib's enough.c
	// computes. The rest is a margin, since this decoder doesn't sort symbols as zlib does.
	litSize  = 1 << 12
	distSize = 1 << 10
)

// An entry of a decoding table describes a symbol:
//
//	bits 0-7   number of bits to consume: the code and its extra bits
//	bits 8-11  length of the code alone; for a pointer, the number of bits that index the second-level table
//	bits 12-15 flags
//	bits 16-30 the literal, the base of the length or distance, or the position of the second-level table
//	bit  31    set for a literal
const (
	literal     = 1 << 31
	exceptional = 1 << 15 // set with each of the flags below
	pointer     = 1 << 14
	endOfBlock  = 1 << 13
	invalid     = exceptional | 1<<12
)

// A decoder decodes DEFLATE streams, one after another.
type decoder struct {
	r        io.Reader
	in       []byte
	pos, end int   // of the input that is not in the bit buffer yet
	base     int64 // offset of in[0] in the input
	eof      bool
	err      error // the error of r, except io.EOF

	buf uint64 // bits above nb are zero or the input's next bits
	nb  uint

	out     []byte
	w       int   // end of the decoded output
	read    int   // end of the output that was returned to the caller
	begin   int   // where the current stream's output begins; distances don't reach beyond
	dropped int64 // number of output bytes that were dropped from out

	state  state
	final  bool
	stored int

	// points, if not nil, tracks where blocks begin and what matches refer to.
	points *points

	lit  *[litSize]uint32
	dist *[distSize]uint32

	dynamicLit  [litSize]uint32
	dynamicDist [distSize]uint32
	lengths     [286 + 30]uint8
}

type state int

const (
	atBlock state = iota
	inStored
	inCodes
	atEnd
)

// load makes at least n bytes of input available, or fewer at the input's end.
func (d *decoder) load(n int) {
	if d.end-d.pos >= n || d.eof {
		return
	}
	kept := min(d.pos, 8) // so that align can give bytes back
	d.base += int64(d.pos - kept)
	d.end = copy(d.in, d.in[d.pos-kept:d.end])
	d.pos = kept
	for empty := 0; d.end-d.pos < n && !d.eof; {
		m, err := d.r.Read(d.in[d.end:])
		d.end += m
		if m == 0 && err == nil {
			if empty++; empty == 100 {
				err = io.ErrNoProgress
			}
		}
		if err != nil {
			d.eof = true
			if err != io.EOF {
				d.err = err
			}
		}
	}
}

// short returns the error for input that ends too early.
func (d *decoder) short() error {
	if d.err != nil {
		return d.err
	}
	return io.ErrUnexpectedEOF
}

// need fills the bit buffer to at least n bits, at most 32.
func (d *decoder) need(n uint) error {
	for d.nb < n {
		if d.pos == d.end {
			if d.load(1); d.pos == d.end {
				return d.short()
			}
		}
		d.buf |= uint64(d.in[d.pos]) << d.nb
		d.pos++
		d.nb += 8
	}
	return nil
}

func (d *decoder) take(n uint) (uint32, error) {
	if err := d.need(n); err != nil {
		return 0, err
	}
	v := uint32(d.buf & (1<<n - 1))
	d.buf >>= n
	d.nb -= n
	return v, nil
}

// align drops the bits up to the next byte boundary, and returns whole bytes to the input.
func (d *decoder) align() {
	d.pos -= int(d.nb / 8)
	d.buf, d.nb = 0, 0
}

// run decodes until the stream ends (atEnd) or the output is full.
func (d *decoder) run() error {
	for d.state != atEnd && len(d.out)-d.w >= roomSize {
		var err error
		switch d.state {
		case atBlock:
			if d.points != nil {
				d.points.block(d)
			}
			err = d.block()
		case inStored:
			err = d.copyStored()
		case inCodes:
			err = d.codes()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *decoder) endBlock() {
	d.state = atBlock
	if d.final {
		d.state = atEnd
		d.align()
	}
}

func (d *decoder) block() error {
	h, err := d.take(3)
	if err != nil {
		return err
	}
	d.final = h&1 != 0
	switch h >> 1 {
	case 0:
		d.align()
		d.load(4)
		if d.end-d.pos < 4 {
			return d.short()
		}
		n := binary.LittleEndian.Uint16(d.in[d.pos:])
		if ^n != binary.LittleEndian.Uint16(d.in[d.pos+2:]) {
			return ErrCorrupt
		}
		d.pos += 4
		d.stored = int(n)
		d.state = inStored
	case 1:
		f := fixed()
		d.lit, d.dist = &f.lit, &f.dist
		d.state = inCodes
	case 2:
		if err := d.readCodes(); err != nil {
			return err
		}
		d.lit, d.dist = &d.dynamicLit, &d.dynamicDist
		d.state = inCodes
	default:
		return ErrCorrupt
	}
	return nil
}

func (d *decoder) copyStored() error {
	if d.stored == 0 {
		d.endBlock()
		return nil
	}
	d.load(1)
	n := min(d.stored, d.end-d.pos, len(d.out)-slack-d.w)
	if d.pos == d.end {
		return d.short()
	}
	copy(d.out[d.w:], d.in[d.pos:d.pos+n])
	d.w += n
	d.pos += n
	d.stored -= n
	return nil
}

// codes decodes symbols until the block ends, the output is full or the input ends.
func (d *decoder) codes() error {
	for len(d.out)-d.w >= roomSize {
		d.load(fastInput)
		var done bool
		var err error
		if d.end-d.pos >= fastInput && (d.points == nil || d.points.pending == nil) {
			done, err = d.fast()
		} else {
			done, err = d.slow()
			if d.points != nil {
				d.points.reportSettled(d)
			}
		}
		if err != nil {
			return err
		}
		if done {
			d.endBlock()
			return nil
		}
	}
	return nil
}

// fast decodes symbols while there are fastInput bytes of input and space for a round. It is long because it is written
// out by hand: as calls, the steps for literals, lengths and refills would not stay in registers.
func (d *decoder) fast() (done bool, err error) {
	in, out := d.in[:d.end], d.out
	pos, w := d.pos, d.w
	buf, nb := d.buf, d.nb
	lit, dist := d.lit, d.dist
	lastIn, lastOut := len(in)-fastInput, len(out)-roomSize
	begin := d.begin

	// The next symbol is looked up before the current one is executed, so that the processor overlaps the two. At the
	// top of the loop e is the entry for the bits in buf.
	buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
	pos += int((63 - nb) >> 3)
	nb |= 56
	e := lit[buf&(1<<litBits-1)]
	for pos <= lastIn && w <= lastOut {
		if int32(e) < 0 {
			buf >>= e & 63
			nb -= uint(e & 63)
			out[w] = byte(e >> 16)
			w++
			e = lit[buf&(1<<litBits-1)]
			if int32(e) < 0 {
				buf >>= e & 63
				nb -= uint(e & 63)
				out[w] = byte(e >> 16)
				w++
				e = lit[buf&(1<<litBits-1)]
				if int32(e) < 0 {
					buf >>= e & 63
					nb -= uint(e & 63)
					out[w] = byte(e >> 16)
					w++
					e = lit[buf&(1<<litBits-1)]
					buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
					pos += int((63 - nb) >> 3)
					nb |= 56
					continue
				}
			}
		}
		// Not a literal. At least 34 bits are left, and a length needs at most 20.
		if e&exceptional != 0 {
			if e&pointer != 0 {
				buf >>= e & 63
				nb -= uint(e & 63)
				e = lit[(uint64(e>>16)+buf&(1<<(e>>8&15)-1))&(litSize-1)]
				if int32(e) < 0 {
					buf >>= e & 63
					nb -= uint(e & 63)
					out[w] = byte(e >> 16)
					w++
					buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
					pos += int((63 - nb) >> 3)
					nb |= 56
					e = lit[buf&(1<<litBits-1)]
					continue
				}
			}
			if e&exceptional != 0 {
				if e&endOfBlock == 0 {
					err = ErrCorrupt
					break
				}
				buf >>= e & 63
				nb -= uint(e & 63)
				done = true
				break
			}
		}
		length := int(e>>16) + int(buf&(1<<(e&63)-1)>>(e>>8&15))
		buf >>= e & 63
		nb -= uint(e & 63)

		e = dist[buf&(1<<distBits-1)]
		buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
		pos += int((63 - nb) >> 3)
		nb |= 56
		if e&exceptional != 0 {
			if e&pointer != 0 {
				buf >>= e & 63
				nb -= uint(e & 63)
				e = dist[(uint64(e>>16)+buf&(1<<(e>>8&15)-1))&(distSize-1)]
			}
			if e&exceptional != 0 {
				err = ErrCorrupt
				break
			}
		}
		back := int(e>>16) + int(buf&(1<<(e&63)-1)>>(e>>8&15))
		buf >>= e & 63
		nb -= uint(e & 63)

		e = lit[buf&(1<<litBits-1)]
		buf |= binary.LittleEndian.Uint64(in[pos:]) << (nb & 63)
		pos += int((63 - nb) >> 3)
		nb |= 56

		from := w - back
		if from < begin {
			err = ErrCorrupt
			break
		}
		to := w + length
		switch {
		case back >= 16:
			*(*[16]byte)(out[w:]) = *(*[16]byte)(out[from:])
			if length > 16 {
				*(*[16]byte)(out[w+16:]) = *(*[16]byte)(out[from+16:])
				for w += 32; w < to; w += 16 {
					*(*[16]byte)(out[w:]) = *(*[16]byte)(out[w-back:])
				}
			}
		case back >= 8:
			for ; w < to; w += 8 {
				*(*[8]byte)(out[w:]) = *(*[8]byte)(out[from:])
				from += 8
			}
		case back == 1:
			v := uint64(out[from]) * 0x0101010101010101
			for ; w < to; w += 8 {
				binary.LittleEndian.PutUint64(out[w:], v)
			}
		default:
			for ; w < to; w++ {
				out[w] = out[from]
				from++
			}
		}
		w = to
	}
	d.pos, d.w, d.buf, d.nb = pos, w, buf, nb
	return done, err
}

// slow decodes one symbol near the end of the input, reading as few bits as it needs.
func (d *decoder) slow() (done bool, err error) {
	e, err := d.symbol(d.lit[:], litBits)
	switch {
	case err != nil:
		return false, err
	case int32(e) < 0:
		d.out[d.w] = byte(e >> 16)
		d.w++
		return false, nil
	case e&endOfBlock != 0:
		return true, nil
	}
	length, err := d.extra(e)
	if err != nil {
		return false, err
	}
	if e, err = d.symbol(d.dist[:], distBits); err != nil {
		return false, err
	}
	back, err := d.extra(e)
	if err != nil {
		return false, err
	}
	from := d.w - back
	if from < d.begin {
		return false, ErrCorrupt
	}
	if d.points != nil {
		d.points.markUsed(d, back, length)
	}
	for range length {
		d.out[d.w] = d.out[from]
		d.w++
		from++
	}
	return false, nil
}

// symbol consumes a code without its extra bits. A table entry is valid as soon as the buffer has all bits of its code,
// because the bits after them don't change the entry.
func (d *decoder) symbol(table []uint32, first uint) (uint32, error) {
	for {
		e := table[d.buf&(1<<first-1)]
		n := uint(e >> 8 & 15)
		if e&(literal|pointer) == pointer {
			e = table[uint64(e>>16)+d.buf>>first&(1<<n-1)]
			n = first + uint(e>>8&15)
		}
		if n <= d.nb {
			if int32(e) >= 0 && e&invalid == invalid {
				return 0, ErrCorrupt
			}
			d.buf >>= n
			d.nb -= n
			return e, nil
		}
		if err := d.need(d.nb + 1); err != nil {
			return 0, err
		}
	}
}

// extra consumes an entry's extra bits, and returns them added to its base.
func (d *decoder) extra(e uint32) (int, error) {
	v, err := d.take(uint(e&63) - uint(e>>8&15))
	return int(e>>16) + int(v), err
}
