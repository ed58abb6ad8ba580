// Package inflate reads gzip streams (RFC 1952), fast.
//
// It decompresses about twice as fast as compress/flate and its offspring, in plain
// memory-safe Go, and is as strict as compress/flate about what a DEFLATE stream (RFC 1951)
// may be: codes are complete, or a single code of one bit; distances stay inside the output;
// lengths of stored blocks match their complement. What was right before an error is handed on
// before it.
//
// What makes it fast: a bit buffer of 64 bits that is refilled without a branch, one table
// look-up a symbol whose entry holds all there is to know of it, several literals for one
// refill, matches copied in pieces of 16 bytes past their end, and a flat output buffer, so
// that the inner loop checks for room once a round. It runs while some bytes of input are
// at hand; a slow loop takes the last ones.
package inflate

import (
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
)

var (
	// ErrHeader is the error of a stream, or of a member after the first, that does not begin
	// as gzip does.
	ErrHeader = errors.New("gzip: invalid header")
	// ErrChecksum is the error of a member whose CRC-32 or length is wrong.
	ErrChecksum = errors.New("gzip: invalid checksum")
	// ErrCorrupt is the error of an invalid DEFLATE stream.
	ErrCorrupt = errors.New("deflate: corrupt data")
)

const (
	windowSize = 32 << 10
	maxMatch   = 258
	slack      = 32 // bytes past its end that a match may touch
	inputSize  = 128 << 10
	outputSize = windowSize + 512<<10 + maxMatch + slack
	fastInput  = 32                   // what one round of the fast loop may read, and more
	roomSize   = maxMatch + slack + 3 // what one round of the fast loop may write

	litBits  = 11
	distBits = 9
	// The most entries that complete codes of 288 and 32 symbols of 15 bits need, as zlib's
	// enough.c counts them, are 2342 and 594; the rest is for symbols that come in no order.
	litSize  = 1 << 12
	distSize = 1 << 10
)

// An entry of a table tells what a symbol is:
//
//	bits 0-7   bits to consume, those of the code and the extra bits
//	bits 8-11  those of the code alone; of a pointer, the bits that index the second table
//	bits 12-15 flags
//	bits 16-30 literal, base of the length or distance, or where the second table begins
//	bit  31    a literal
const (
	literal     = 1 << 31
	exceptional = 1 << 15 // none of what follows is set without it
	pointer     = 1 << 14
	endOfBlock  = 1 << 13
	invalid     = exceptional | 1<<12
)

// A decoder reads one DEFLATE stream after another.
type decoder struct {
	r        io.Reader
	in       []byte
	pos, end int   // of the input that is not in the bit buffer
	base     int64 // offset in the input of in[0]
	eof      bool
	err      error // of r, io.EOF aside

	buf uint64 // bits above nb are either zero or those that follow
	nb  uint

	out   []byte
	w     int   // end of what is written
	read  int   // end of what is handed on
	begin int   // where the stream's own output begins: what distances may reach
	gone  int64 // bytes of output that are not in out any more

	state  state
	final  bool
	stored int

	// points, unless it is nil, is told where blocks begin and what matches refer to.
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

// load makes at least n bytes of input available, fewer only at its end.
func (d *decoder) load(n int) {
	if d.end-d.pos >= n || d.eof {
		return
	}
	kept := min(d.pos, 8) // for align
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

// short is the error of input that ended too early.
func (d *decoder) short() error {
	if d.err != nil {
		return d.err
	}
	return io.ErrUnexpectedEOF
}

// need has at least n bits, at most 32, in the bit buffer.
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

// align drops bits up to the next byte and gives whole bytes back to the input.
func (d *decoder) align() {
	d.pos -= int(d.nb / 8)
	d.buf, d.nb = 0, 0
}

// run decodes until the stream ends (atEnd) or the output has no room.
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

// codes decodes symbols until the block ends, the output has no room or the input ends.
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
				d.points.settle(d)
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

// fast decodes symbols while fastInput bytes of input and room for a round are left.
func (d *decoder) fast() (done bool, err error) {
	in, out := d.in[:d.end], d.out
	pos, w := d.pos, d.w
	buf, nb := d.buf, d.nb
	lit, dist := d.lit, d.dist
	lastIn, lastOut := len(in)-fastInput, len(out)-roomSize
	begin := d.begin

	// The next symbol is looked up before the one at hand is carried out, so that the two
	// overlap: e is always the entry of what buf holds.
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
		// No literal: at least 34 bits are left, a length has at most 20.
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

// slow decodes one symbol near the end of the input, bit by bit where it must.
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
		d.points.reach(d, back, length)
	}
	for range length {
		d.out[d.w] = d.out[from]
		d.w++
		from++
	}
	return false, nil
}

// symbol consumes a code, not its extra bits. An entry that is found counts once all bits of its
// code are there: those that follow don't change what is found.
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

// extra is an entry's base and the extra bits that follow its code.
func (d *decoder) extra(e uint32) (int, error) {
	v, err := d.take(uint(e&63) - uint(e>>8&15))
	return int(e>>16) + int(v), err
}

var lengthOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readCodes reads the codes of a dynamic block.
func (d *decoder) readCodes() error {
	h, err := d.take(14)
	if err != nil {
		return err
	}
	nlit, ndist, nlen := int(h&31)+257, int(h>>5&31)+1, int(h>>10)+4
	if nlit > 286 || ndist > 30 {
		return ErrCorrupt
	}
	var lens [19]uint8
	for _, i := range lengthOrder[:nlen] {
		v, err := d.take(3)
		if err != nil {
			return err
		}
		lens[i] = uint8(v)
	}
	table := d.dynamicDist[:]
	if !build(table, 7, lens[:], plainEntry[:]) {
		return ErrCorrupt
	}
	lengths := d.lengths[:nlit+ndist]
	for i := 0; i < len(lengths); {
		e, err := d.symbol(table, 7)
		if err != nil {
			return err
		}
		sym := uint8(e >> 16)
		if sym < 16 {
			lengths[i] = sym
			i++
			continue
		}
		var again uint8
		repeat, extra := 3, uint(2)
		switch sym {
		case 16:
			if i == 0 {
				return ErrCorrupt
			}
			again = lengths[i-1]
		case 17:
			extra = 3
		default:
			repeat, extra = 11, 7
		}
		v, err := d.take(extra)
		if err != nil {
			return err
		}
		if repeat += int(v); i+repeat > len(lengths) {
			return ErrCorrupt
		}
		for range repeat {
			lengths[i] = again
			i++
		}
	}
	if !build(d.dynamicLit[:], litBits, lengths[:nlit], litEntry[:]) || !build(d.dynamicDist[:], distBits, lengths[nlit:], distEntry[:]) {
		return ErrCorrupt
	}
	return nil
}

// What a symbol's entry is, but for the bits of its code.
var (
	plainEntry [19]uint32
	litEntry   [288]uint32
	distEntry  [32]uint32
)

func init() {
	for i := range plainEntry {
		plainEntry[i] = uint32(i) << 16
	}
	for i := range 256 {
		litEntry[i] = literal | uint32(i)<<16
	}
	litEntry[256] = exceptional | endOfBlock
	base := uint32(3)
	for i := range uint32(28) {
		extra := max(i/4, 1) - 1
		litEntry[257+i] = base<<16 | extra
		base += 1 << extra
	}
	litEntry[285] = 258 << 16
	litEntry[286], litEntry[287] = invalid, invalid
	base = 1
	for i := range uint32(30) {
		extra := max(i/2, 1) - 1
		distEntry[i] = base<<16 | extra
		base += 1 << extra
	}
	distEntry[30], distEntry[31] = invalid, invalid
}

// build makes the table of a code from its lengths, with a first level of first bits. It tells
// whether the code may be: complete, or of a single symbol with one bit, or empty.
func build(table []uint32, first uint, lengths []uint8, entries []uint32) bool {
	var count, next [16]int
	for _, n := range lengths {
		count[n]++
	}
	longest := uint(0)
	code, total := 0, 0
	for n := uint(1); n < 16; n++ {
		code <<= 1
		next[n] = total
		if count[n] > 0 {
			longest = n
		}
		code += count[n]
		total += count[n]
		if code > 1<<n {
			return false
		}
	}
	level := table[:1<<first]
	if longest == 0 {
		fill(level, invalid)
		return true
	}
	if code != 1<<15 && (longest != 1 || count[1] != 1) {
		return false
	}
	if longest == 1 && count[1] == 1 {
		fill(level, invalid|1<<8|1)
	}
	// Symbols by length, and among those of one by number: the order of their codes.
	var sorted [288]uint16
	for sym, n := range lengths {
		if n > 0 {
			sorted[next[n]] = uint16(sym)
			next[n]++
		}
	}
	code = 0
	free := 1 << first // where the next second level begins
	prefix, sub, subBits := -1, 0, uint(0)
	i := 0
	for n := uint(1); n <= longest; n++ {
		left := count[n]
		for ; left > 0; left-- {
			e := entries[sorted[i]]
			i++
			reversed := int(bits.Reverse16(uint16(code)) >> (16 - n))
			if n <= first {
				e += uint32(n<<8 | n)
				for j := reversed; j < 1<<first; j += 1 << n {
					level[j] = e
				}
			} else {
				if p := reversed & (1<<first - 1); p != prefix {
					// As many bits as the codes with this prefix fill, shortest first.
					prefix, sub, subBits = p, free, n-first
					for used := left; subBits+first < longest && used < 1<<subBits; {
						subBits++
						used = used<<1 + count[subBits+first]
					}
					free += 1 << subBits
					level[prefix] = exceptional | pointer | uint32(sub)<<16 | uint32(subBits)<<8 | uint32(first)
				}
				m := n - first
				e += uint32(m<<8 | m)
				for j := reversed >> first; j < 1<<subBits; j += 1 << m {
					table[sub+j] = e
				}
			}
			code++
		}
		code <<= 1
	}
	return true
}

func fill(t []uint32, e uint32) {
	for i := range t {
		t[i] = e
	}
}
