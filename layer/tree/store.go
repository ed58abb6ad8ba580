package tree

import (
	"hash/maphash"
	"math/bits"
)

const (
	listBits = 10 // log2 of the number of values in a chunk of a list

	nameChunk = 8 << 10 // bytes
	nameGroup = 16      // the offset of every nameGroup-th name is stored

	// A slot of an index holds a name's number and tagBits bits of its hash. The bits spare most comparisons with other
	// names.
	tagBits    = 6
	maxEntries = 1 << (32 - tagBits)
)

// A list grows without copying its values.
type list[T any] struct {
	chunks [][]T
	n      uint32
}

func (l *list[T]) at(i uint32) *T { return &l.chunks[i>>listBits][i&(1<<listBits-1)] }

// add appends a value and returns its number.
func (l *list[T]) add(v T) uint32 {
	if l.n>>listBits == uint32(len(l.chunks)) {
		l.chunks = append(l.chunks, make([]T, 1<<listBits))
	}
	i := l.n
	l.n++
	*l.at(i) = v
	return i
}

// names stores strings of at most 255 bytes, each after a byte with its length. The offset of every nameGroup-th name
// is kept; the names after it are found by counting.
type names struct {
	chunks [][]byte
	groups []uint32
	n      uint32
}

// full reports whether the offset of another name might not fit into 32 bits.
func (s *names) full() bool { return len(s.chunks) >= 1<<32/nameChunk }

func (s *names) add(name string) {
	last := len(s.chunks) - 1
	if last < 0 || len(s.chunks[last])+1+len(name) > nameChunk {
		s.chunks = append(s.chunks, make([]byte, 0, nameChunk))
		last++
	}
	c := &s.chunks[last]
	if s.n%nameGroup == 0 {
		s.groups = append(s.groups, uint32(last*nameChunk+len(*c)))
	}
	*c = append(append(*c, byte(len(name))), name...)
	s.n++
}

func (s *names) at(i uint32) []byte {
	at := s.groups[i/nameGroup]
	chunk, from := s.chunks[at/nameChunk], int(at%nameChunk)
	for n := i % nameGroup; ; n-- {
		if from == len(chunk) {
			at = (at/nameChunk + 1) * nameChunk
			chunk, from = s.chunks[at/nameChunk], 0
		}
		end := from + 1 + int(chunk[from])
		if n == 0 {
			return chunk[from+1 : end]
		}
		from = end
	}
}

// An index finds entries by directory and name. It is a hash table with linear probing. Its seed is random, so that a
// layer can't choose names that collide.
type index struct {
	seed  maphash.Seed
	slots []uint32
	used  int
}

func (ix *index) hash(dir uint32, name []byte) uint64 {
	return (maphash.Bytes(ix.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15) * 0xd6e8feb86659fd93
}

// slot returns where probing for a hash begins, and the bits of the hash that its slot holds.
func (ix *index) slot(hash uint64) (at uint64, tag uint32) {
	at, _ = bits.Mul64(hash, uint64(len(ix.slots)))
	return at, uint32(hash) & (1<<tagBits - 1)
}

// find returns the number for which is returns true, or 0.
func (ix *index) find(hash uint64, is func(uint32) bool) uint32 {
	if ix.used == 0 {
		return 0
	}
	for at, tag := ix.slot(hash); ; at++ {
		if at == uint64(len(ix.slots)) {
			at = 0
		}
		switch s := ix.slots[at]; {
		case s == 0:
			return 0
		case s&(1<<tagBits-1) == tag && is(s>>tagBits):
			return s >> tagBits
		}
	}
}

// add adds a number other than 0. hashOf returns the hash of a number added before.
func (ix *index) add(hash uint64, number uint32, hashOf func(uint32) uint64) {
	if ix.used >= len(ix.slots)/8*7 {
		ix.slots = nil // lets the old table be freed before the new one is made
		ix.slots = make([]uint32, max(64, ix.used/2*3))
		for n := uint32(1); n < number; n++ {
			ix.insert(hashOf(n), n)
		}
	}
	ix.insert(hash, number)
	ix.used++
}

func (ix *index) insert(hash uint64, number uint32) {
	at, tag := ix.slot(hash)
	for ix.slots[at] != 0 {
		if at++; at == uint64(len(ix.slots)) {
			at = 0
		}
	}
	ix.slots[at] = number<<tagBits | tag
}
