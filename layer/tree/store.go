package tree

import (
	"hash/maphash"
	"math/bits"
)

const (
	listBits = 10 // log2 of the number of values in a chunk of a list

	nameChunk = 8 << 10 // bytes
	nameGroup = 8       // the offset of every nameGroup-th name is stored
	nibble    = 15

	// Numbers have 26 bits. A slot of an index holds a name's number and 6 bits of its hash. The bits spare most comparisons
	// with other names.
	spareBits  = 6
	spare      = 1<<spareBits - 1
	maxEntries = 1 << (32 - spareBits)

	shardBits = 6 // log2 of the number of shards of an index
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

// names stores strings of at most 255 bytes. Each begins with a byte of two numbers of 4 bits: how many bytes it shares
// with the string before it, and how many bytes follow. If 15 or more follow, their number is a byte of its own. The offset of every
// nameGroup-th name is kept, which shares nothing; the names after it are found by counting.
type names struct {
	chunks [][]byte
	groups []uint32
	n      uint32
	last   []byte
}

// full reports whether the offset of another name might not fit into 32 bits.
func (s *names) full() bool { return len(s.chunks) >= 1<<32/nameChunk }

func (s *names) add(name string) {
	last := len(s.chunks) - 1
	if last < 0 || len(s.chunks[last])+2+len(name) > nameChunk {
		s.chunks = append(s.chunks, make([]byte, 0, nameChunk))
		last++
	}
	c := &s.chunks[last]
	shared := 0
	if s.n%nameGroup == 0 {
		s.groups = append(s.groups, uint32(last*nameChunk+len(*c)))
	} else {
		for shared < min(nibble, len(name), len(s.last)) && name[shared] == s.last[shared] {
			shared++
		}
	}
	s.last = append(s.last[:0], name...)
	rest := name[shared:]
	if *c = append(*c, byte(shared<<4|min(nibble, len(rest)))); len(rest) >= nibble {
		*c = append(*c, byte(len(rest)))
	}
	*c = append(*c, rest...)
	s.n++
}

// append writes a name into b, which must be empty. Without room for 255 bytes in it, memory is allocated.
func (s *names) append(b []byte, i uint32) []byte {
	at := s.groups[i/nameGroup]
	chunk, from := s.chunks[at/nameChunk], int(at%nameChunk)
	for n := i % nameGroup; ; n-- {
		if from == len(chunk) {
			at = (at/nameChunk + 1) * nameChunk
			chunk, from = s.chunks[at/nameChunk], 0
		}
		shared, rest := int(chunk[from]>>4), int(chunk[from]&nibble)
		from++
		if rest == nibble {
			rest = int(chunk[from])
			from++
		}
		b = append(b[:shared], chunk[from:from+rest]...)
		if n == 0 {
			return b
		}
		from += rest
	}
}

// An index finds entries by directory and name. It is a hash table with linear probing. Its seed is random, so that a
// layer can't choose names that collide. Its shards grow one by one, so that little memory is taken twice meanwhile.
type index struct {
	seed   maphash.Seed
	shards [1 << shardBits]shard
}

type shard struct {
	slots []uint32
	used  int
}

func (ix *index) hash(dir uint32, name []byte) uint64 {
	return (maphash.Bytes(ix.seed, name) ^ uint64(dir)*0x9e3779b97f4a7c15) * 0xd6e8feb86659fd93
}

// find returns the number for which is returns true, or 0.
func (ix *index) find(hash uint64, is func(uint32) bool) uint32 {
	s := &ix.shards[hash>>(64-shardBits)]
	if s.used == 0 {
		return 0
	}
	for at, tag := s.slot(hash); ; at++ {
		if at == uint64(len(s.slots)) {
			at = 0
		}
		switch v := s.slots[at]; {
		case v == 0:
			return 0
		case v&spare == tag && is(v>>spareBits):
			return v >> spareBits
		}
	}
}

// add adds a number other than 0. hashOf returns the hash of a number added before.
func (ix *index) add(hash uint64, number uint32, hashOf func(uint32) uint64) {
	s := &ix.shards[hash>>(64-shardBits)]
	if s.used >= len(s.slots)*7/8 {
		old := s.slots
		s.slots = make([]uint32, max(16, s.used*10/7))
		for _, v := range old {
			if v != 0 {
				s.insert(hashOf(v>>spareBits), v>>spareBits)
			}
		}
	}
	s.insert(hash, number)
	s.used++
}

// slot returns where probing for a hash begins, and the bits of the hash that its slot holds.
func (s *shard) slot(hash uint64) (at uint64, tag uint32) {
	at, _ = bits.Mul64(hash<<shardBits, uint64(len(s.slots)))
	return at, uint32(hash) & spare
}

func (s *shard) insert(hash uint64, number uint32) {
	at, tag := s.slot(hash)
	for s.slots[at] != 0 {
		if at++; at == uint64(len(s.slots)) {
			at = 0
		}
	}
	s.slots[at] = number<<spareBits | tag
}
