package erofs

import (
	"cmp"
	"encoding/binary"
	"os"
	"slices"
	"strings"

	"distkit/layer"
)

const ext4GroupBytes = ext4Group << ext4Bits

// put writes content. Before the first block of a group it writes the group's head.
func (x *ext4) put(b []byte) error {
	return x.inGroups(int64(len(b)), func(n int64) error {
		part := b[:n]
		b = b[n:]
		return x.out.write(part)
	})
}

func (x *ext4) copy(f *os.File, offset, n int64) error {
	return x.inGroups(n, func(n int64) error {
		offset += n
		return x.out.copy(f, offset-n, n)
	})
}

func (x *ext4) hole(n int64) error { return x.inGroups(n, x.out.hole) }

// inGroups splits n bytes at the ends of groups, and calls f with the size of each part.
func (x *ext4) inGroups(n int64, f func(n int64) error) error {
	for n > 0 {
		if x.out.written%ext4GroupBytes == 0 {
			if err := x.begin(x.out.written / ext4GroupBytes); err != nil {
				return err
			}
		}
		part := min(n, ext4GroupBytes-x.out.written%ext4GroupBytes)
		if err := f(part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}

// rest writes what follows the last file.
func (x *ext4) rest() error {
	for total := x.blocks << ext4Bits; x.out.written < total; {
		if x.out.written%ext4GroupBytes == 0 {
			if err := x.begin(x.out.written / ext4GroupBytes); err != nil {
				return err
			}
		}
		if err := x.out.hole(min(total, align(x.out.written+1, ext4GroupBytes)) - x.out.written); err != nil {
			return err
		}
	}
	return nil
}

// begin writes the head of a group: superblock and descriptors if it has copies, bitmaps, inodes.
func (x *ext4) begin(group int64) error {
	if isBackup(group) {
		b := make([]byte, ext4Block)
		if group == 0 {
			x.superblock(b[1024:], group)
		} else {
			x.superblock(b, group)
		}
		if err := x.out.write(b); err != nil {
			return err
		}
		if err := x.out.write(x.descriptors); err != nil {
			return err
		}
	}
	inodes := int64(len(x.order)-1+ext4First-1) - group*x.perGroup
	inodes = max(0, min(inodes, x.perGroup))
	for _, used := range [][2]int64{{x.used(group), min(ext4Group, x.blocks-group*ext4Group)}, {inodes, x.perGroup}} {
		if err := x.out.write(bitmap(used[0], used[1])); err != nil {
			return err
		}
	}
	var b [ext4Inode]byte
	for number := group*x.perGroup + 1; number <= group*x.perGroup+inodes; number++ {
		clear(b[:])
		switch {
		case number == ext4Root:
			x.inode(b[:], x.order[0])
		case number == ext4Journal && x.journal.size > 0:
			x.inode(b[:], x.journal)
		case number >= ext4First:
			x.inode(b[:], x.order[number-ext4First+1])
		}
		if err := x.out.write(b[:]); err != nil {
			return err
		}
	}
	return x.out.hole((x.perGroup - inodes) * ext4Inode)
}

// bitmap returns a block with a bit for each of size items. The first used bits are set, and so are the bits after the
// last item.
func bitmap(used, size int64) []byte {
	b := make([]byte, ext4Block)
	for i := range b {
		for bit := range 8 {
			if n := int64(i*8 + bit); n < used || n >= size {
				b[i] |= 1 << bit
			}
		}
	}
	return b
}

func (x *ext4) superblock(b []byte, group int64) {
	compat := uint32(ext4FeatureXattr)
	inodes := x.perGroup * x.groups
	for _, f := range []struct {
		at    int
		value uint32
	}{
		{0, uint32(inodes)}, {4, uint32(x.blocks)}, {12, uint32(x.free)}, {16, uint32(inodes - int64(len(x.order)-1+ext4First-1))},
		{24, ext4Bits - 10}, {28, ext4Bits - 10}, {32, ext4Group}, {36, ext4Group}, {40, uint32(x.perGroup)},
		{52, 0xffff << 16}, {56, 1<<16 | 0xef53}, {60, 1}, {76, 1}, {84, ext4First}, {88, ext4Inode | uint32(group)<<16},
		{96, ext4FeatureTypes | ext4FeatureExtents},
		{100, ext4FeatureSparseSuper | ext4FeatureLarge | ext4FeatureHuge | ext4FeatureDirLinks | ext4FeatureExtra},
		{256, 0xc}, {348, ext4ExtraSize<<16 | ext4ExtraSize},
	} {
		little.PutUint32(b[f.at:], f.value)
	}
	copy(b[104:], x.uuid[:])
	if x.journal.size > 0 {
		compat |= ext4FeatureJournal
		little.PutUint32(b[224:], ext4Journal)
		b[253] = 1 // a copy of the blocks and size of the journal's inode
		var n [ext4Inode]byte
		x.inode(n[:], x.journal)
		copy(b[268:], n[40:100])
		little.PutUint32(b[268+64:], uint32(x.journal.size))
		little.PutUint32(b[268+60:], uint32(x.journal.size>>32))
	}
	little.PutUint32(b[92:], compat)
}

// inode encodes an inode.
func (x *ext4) inode(b []byte, n *inode) {
	p := place{x, int64(n.address)}
	l := p.plan(n)
	size, links := n.size, n.links
	flags := uint32(ext4FlagExtents)
	switch beside := b[40:100]; n.mode & typeMask {
	case typeSymlink:
		target := x.tree.Target(n.entry)
		if size = int64(len(target)); size < ext4Beside {
			copy(beside, target)
			flags = 0
			break
		}
		l.extents(beside)
	case typeDir, typeFile:
		l.extents(beside)
		if n.isDir() && links > ext4MaxLinks {
			links = 1 // stands for a count that is too large (ext4's dir_nlink)
		}
	case typeChar, typeBlock:
		flags = 0
		if major := n.number >> 8 & 0xfff; major < 256 && n.number>>20 == 0 {
			little.PutUint32(beside, n.number)
		} else {
			little.PutUint32(beside[4:], n.number)
		}
	default:
		flags = 0
	}
	blocks := l.blocks() * (ext4Block / 512)
	extra := n.nanoseconds<<2 | uint32((n.seconds-int64(int32(n.seconds)))>>32&3)
	little.PutUint16(b, n.mode)
	little.PutUint16(b[2:], uint16(n.uid))
	little.PutUint16(b[120:], uint16(n.uid>>16))
	little.PutUint16(b[24:], uint16(n.gid))
	little.PutUint16(b[122:], uint16(n.gid>>16))
	little.PutUint32(b[4:], uint32(size))
	little.PutUint32(b[108:], uint32(size>>32))
	for _, at := range []int{8, 12, 16, 144} { // times of access, change, modification and creation
		little.PutUint32(b[at:], uint32(n.seconds))
	}
	for _, at := range []int{132, 136, 140, 148} {
		little.PutUint32(b[at:], extra)
	}
	little.PutUint16(b[26:], uint16(links))
	little.PutUint32(b[28:], uint32(blocks))
	little.PutUint16(b[116:], uint16(blocks>>32))
	little.PutUint32(b[32:], flags)
	little.PutUint32(b[104:], l.xattrs)
	little.PutUint16(b[128:], ext4ExtraSize)
}

// contents writes the blocks of all files: attributes, extent nodes and data.
func (x *ext4) contents() error {
	for n := range x.all() {
		p := place{x, int64(n.address)}
		l := p.plan(n)
		if l.xattrs > 0 {
			if err := x.put(ext4Xattrs(n.rare.xattrs)); err != nil {
				return err
			}
		}
		var beside [60]byte
		for _, node := range l.extents(beside[:]) {
			if err := x.put(node); err != nil {
				return err
			}
		}
		if err := x.data(n, l); err != nil {
			return err
		}
		if err := x.put(padding[:align(x.out.written, ext4Block)-x.out.written]); err != nil {
			return err
		}
	}
	return nil
}

func (x *ext4) data(n *inode, l plan) error {
	switch {
	case len(l.data) == 0:
		return nil
	case n == x.journal:
		b := make([]byte, ext4Block)
		for i, v := range []uint32{0xc03b3998, 4, 0, ext4Block, uint32(n.size >> ext4Bits), 1, 1} { // a superblock of version 2, with an empty log
			binary.BigEndian.PutUint32(b[4*i:], v)
		}
		copy(b[48:], x.uuid[:])
		binary.BigEndian.PutUint32(b[64:], 1) // number of users
		if err := x.put(b); err != nil {
			return err
		}
		return x.hole(n.size - ext4Block)
	case n.isDir():
		_, err := x.dirents(n, x.put)
		return err
	case n.isSparse():
		for _, r := range n.rare.runs {
			if err := x.copy(x.chunks, r.offset, int64(r.chunks)<<sparseBits); err != nil {
				return err
			}
		}
		return nil
	case n.mode&typeMask == typeSymlink:
		return x.put([]byte(x.tree.Target(n.entry)))
	}
	return x.copy(x.plain, x.layers[n.device-1].offset+n.offset, n.size)
}

// ext4Xattrs encodes attributes into a block, in the order that the kernel's binary search expects.
func ext4Xattrs(list []layer.Xattr) []byte {
	type attribute struct {
		index  byte
		suffix string
		value  []byte
	}
	var sorted []attribute
	for _, a := range list {
		index, suffix := splitXattr(a.Name)
		sorted = append(sorted, attribute{index, suffix, ext4Value(a)})
	}
	slices.SortFunc(sorted, func(a, b attribute) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.suffix), len(b.suffix)), strings.Compare(a.suffix, b.suffix))
	})
	b := make([]byte, ext4Block)
	little.PutUint32(b, 0xea020000)
	little.PutUint32(b[4:], 1) // reference count: one file
	little.PutUint32(b[8:], 1) // number of blocks
	at, value, all := ext4XattrHeader, ext4Block, uint32(0)
	for _, a := range sorted {
		d := b[at:]
		d[0], d[1] = byte(len(a.suffix)), a.index
		if len(a.value) > 0 {
			value -= int(align(int64(len(a.value)), 4))
			copy(b[value:], a.value)
			little.PutUint16(d[2:], uint16(value))
		}
		little.PutUint32(d[8:], uint32(len(a.value)))
		copy(d[ext4XattrEntry:], a.suffix)
		hash := uint32(0)
		for i := range len(a.suffix) {
			hash = hash<<5 ^ hash>>27 ^ uint32(a.suffix[i])
		}
		for v := b[value:][:align(int64(len(a.value)), 4)]; len(v) > 0; v = v[4:] {
			hash = hash<<16 ^ hash>>16 ^ little.Uint32(v)
		}
		little.PutUint32(d[12:], hash)
		all = all<<16 ^ all>>16 ^ hash
		at += ext4XattrEntry + int(align(int64(len(a.suffix)), 4))
	}
	little.PutUint32(b[12:], all)
	return b
}

// ext4Value returns an attribute's value in ext4's encoding, which for ACLs differs from the usual one.
func ext4Value(a layer.Xattr) []byte {
	if a.Name != accessACL && a.Name != defaultACL {
		return a.Value
	}
	v := []byte{1, 0, 0, 0}
	for e := range slices.Chunk(a.Value[4:], 8) {
		switch little.Uint16(e) {
		case aclUser, aclGroup:
			v = append(v, e...)
		default: // these have no ID
			v = append(v, e[:4]...)
		}
	}
	return v
}
