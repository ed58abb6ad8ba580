package inflate

import (
	"math/bits"
	"sync"
)

var lengthOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readCodes reads the code lengths of a dynamic block, and builds its tables.
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
		var value uint8
		repeat, extra := 3, uint(2)
		switch sym {
		case 16:
			if i == 0 {
				return ErrCorrupt
			}
			value = lengths[i-1]
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
			lengths[i] = value
			i++
		}
	}
	if !build(d.dynamicLit[:], litBits, lengths[:nlit], litEntry[:]) || !build(d.dynamicDist[:], distBits, lengths[nlit:], distEntry[:]) {
		return ErrCorrupt
	}
	return nil
}

// The entries of each symbol without the bits of its code.
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

// build fills the decoding table of a code given by its lengths. The first level is indexed by first bits. It returns
// false if the code is invalid: it must be complete, or a single code of one bit, or empty.
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
	// The symbols sorted by code length, and within a length by number: the order of their codes.
	var sorted [288]uint16
	for sym, n := range lengths {
		if n > 0 {
			sorted[next[n]] = uint16(sym)
			next[n]++
		}
	}
	code = 0
	free := 1 << first // where the next second-level table goes
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
					// The table needs as many bits as the codes with this prefix fill, counting the shortest first.
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

type fixedCodes struct {
	lit  [litSize]uint32
	dist [distSize]uint32
}

// fixed returns the tables of the fixed codes (RFC 1951, 3.2.6).
var fixed = sync.OnceValue(func() *fixedCodes {
	var lengths [288]uint8
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		default:
			lengths[i] = 8
		}
	}
	f := new(fixedCodes)
	build(f.lit[:], litBits, lengths[:], litEntry[:])
	for i := range 32 {
		lengths[i] = 5
	}
	build(f.dist[:], distBits, lengths[:32], distEntry[:])
	return f
})
