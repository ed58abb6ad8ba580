package erofs

import (
	"context"
	"io"
	"iter"
	"math"
	"slices"

	"distkit/layer"
	"distkit/layer/tree"
)

// Sizes and values of ext4, as in the kernel's Documentation/filesystems/ext4. As in ext3, each group of blocks begins
// with its own bitmaps and inodes, so the file system can be written from beginning to end without seeking.
const (
	ext4Bits, ext4Block = 12, 1 << 12
	ext4Group           = 8 * ext4Block // blocks of a group: as many as a bitmap of one block has bits
	ext4Inode           = 256
	ext4PerBlock        = ext4Block / ext4Inode
	ext4Descriptor      = 32
	ext4Rounding        = 1 << 20 / ext4Block // the number of blocks is a multiple of this, so that the last group has room for its bitmaps and inodes

	ext4Root, ext4Journal, ext4First = 2, 8, 11 // numbers of inodes
	ext4MaxLinks                     = 65000

	ext4FeatureJournal, ext4FeatureXattr           = 4, 8
	ext4FeatureTypes, ext4FeatureExtents           = 2, 0x40
	ext4FeatureSparseSuper, ext4FeatureLarge       = 1, 2
	ext4FeatureHuge, ext4FeatureDirLinks           = 8, 0x20
	ext4FeatureExtra                               = 0x40
	ext4FlagExtents                                = 0x80000
	ext4ExtraSize                                  = 32
	ext4InRoot, ext4InNode                         = 4, (ext4Block - 12) / 12 // extents in an inode, and in a block
	ext4Beside                                     = 60                       // bytes of a symbolic link's target that fit into the inode, with a NUL
	ext4XattrHeader, ext4XattrEntry                = 32, 16
	ext4Earliest, ext4Latest                 int64 = math.MinInt32, 3<<32 + math.MaxInt32
)

// An ext4 lays out a Builder's tree as an ext4 file system and writes it.
type ext4 struct {
	*Builder
	order   []*inode // by number: the root directory, then the inodes from ext4First on
	names   []tree.Entry
	journal *inode // without a journal, its size is 0

	groups, blocks, perGroup int64 // perGroup is the number of inodes in each group.
	end                      int64 // no file has a block from this one on
	descriptors              []byte
	free                     int64 // number of free blocks
	out                      output
	uuid                     [16]byte
}

// WriteExt4 writes an ext4 file system to w. It has size bytes, rounded down to 1 MiB, and a journal, because its user
// may write to it. If size is 0, it is as small as the files allow, without a journal. After it, as after Write, only
// Close may be called. Directories are not indexed. Attributes that do not fit into one block a file, and times that
// ext4 can't hold, are left out and counted. FailedPrecondition: the files do not fit. NotImplemented: something was
// left out, and Options.Strict is set.
func (b *Builder) WriteExt4(ctx context.Context, w io.Writer, size int64) error {
	x := &ext4{Builder: b, uuid: b.UUID("ext4"), out: output{ctx: ctx, w: w, buffer: make([]byte, 0, bufferSize)}}
	if err := x.number(); err != nil {
		return err
	}
	if err := b.strict(); err != nil {
		return err
	}
	if err := x.fit(size / ext4Block / ext4Rounding * ext4Rounding); err != nil {
		return err
	}
	if err := x.contents(); err != nil {
		return err
	}
	if err := x.rest(); err != nil {
		return err
	}
	return x.out.end()
}

// number numbers the inodes, and drops what ext4 can't hold.
func (x *ext4) number() error {
	add := func(e tree.Entry) error {
		n := x.tree.File(e)
		n.entry, n.links, n.slot = e, x.tree.Links(e), uint32(len(x.order)+ext4First-1)
		x.order = append(x.order, n)
		if s := min(max(n.seconds, ext4Earliest), ext4Latest); s != n.seconds {
			n.seconds, n.nanoseconds = s, 0
			x.unset["times"]++
		}
		if n.rare != nil {
			room := ext4Block - ext4XattrHeader - 4
			n.rare.xattrs = slices.DeleteFunc(n.rare.xattrs, func(a layer.Xattr) bool {
				_, suffix := splitXattr(a.Name)
				size := ext4XattrEntry + int(align(int64(len(suffix)), 4)+align(int64(len(ext4Value(a))), 4))
				if size <= room {
					room -= size
					return false
				}
				x.unset[a.Kind()]++
				return true
			})
		}
		if n.isDir() {
			n.size, _ = x.dirents(n, nil) // the error can only come from the function
			n.links = 2
		} else if n.links > ext4MaxLinks {
			return tooMuch("a file has more than %d names", ext4MaxLinks)
		}
		return nil
	}
	if err := add(tree.Root); err != nil {
		return err
	}
	x.order[0].slot = ext4Root
	var below func(dir tree.Entry) error
	below = func(dir tree.Entry) error {
		list := x.tree.Children(dir, nil)
		for _, e := range list {
			n := x.tree.File(e)
			if n.slot == 0 { // not numbered yet under another name
				if err := add(e); err != nil {
					return err
				}
			}
			if n.isDir() {
				x.tree.File(dir).links++
			}
		}
		for _, e := range list {
			if x.tree.Kind(e) == tree.Dir {
				if err := below(e); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return below(tree.Root)
}

// fit computes the number of groups, and places the content of all files. size is the number of blocks of the file
// system, or 0 for as many as needed. Each pass tries a number of groups: the more groups, the more blocks their heads
// take.
func (x *ext4) fit(size int64) error {
	inodes := int64(len(x.order) - 1 + ext4First - 1)
	const limit = math.MaxUint32 / ext4Rounding * ext4Rounding
	most := size
	if size == 0 {
		most = limit
	} else if size > limit {
		return tooMuch("the file system can't have more than %d bytes", int64(limit)<<ext4Bits)
	}
	x.journal = &inode{mode: typeFile | 0o600, links: 1, device: 1, slot: ext4Journal}
	x.groups = max(1, (inodes+ext4Group-1)/ext4Group, (size+ext4Group-1)/ext4Group)
	for {
		x.perGroup = align((inodes+x.groups-1)/x.groups, ext4PerBlock)
		x.blocks = size
		if size > 0 {
			x.perGroup = max(x.perGroup, ext4Group/4)
			if last := (x.groups - 1) * ext4Group; size < last+x.head(x.groups-1) {
				if x.groups--; x.groups == 0 {
					return tooMuch("%d bytes are too few for a file system", size<<ext4Bits)
				}
				size = last // the rest is too small for a group
				continue
			}
			x.journal.size = ext4JournalBlocks(size) << ext4Bits
		}
		p := place{ext4: x}
		for n := range x.all() {
			n.address = uint32(p.at)
			if p.plan(n); p.at > most || x.perGroup > ext4Group {
				return tooMuch("the files take more than %d bytes", most<<ext4Bits)
			}
		}
		x.end = p.at
		if size == 0 {
			x.blocks = align(max(p.at, (x.groups-1)*ext4Group+x.head(x.groups-1)), ext4Rounding)
		}
		needed := (x.blocks + ext4Group - 1) / ext4Group
		if needed <= x.groups {
			x.describe()
			return nil
		}
		x.groups = needed
	}
}

// all yields the journal, if any, and then every inode, in the order of their content.
func (x *ext4) all() iter.Seq[*inode] {
	return func(yield func(*inode) bool) {
		if x.journal.size > 0 && !yield(x.journal) {
			return
		}
		for _, n := range x.order {
			if !yield(n) {
				return
			}
		}
	}
}

// describe builds the group descriptors.
func (x *ext4) describe() {
	x.descriptors = make([]byte, align(x.groups*ext4Descriptor, ext4Block))
	inodes := int64(len(x.order) - 1 + ext4First - 1)
	for g := range x.groups {
		d := x.descriptors[g*ext4Descriptor:]
		first := g * ext4Group
		if isBackup(g) {
			first += 1 + int64(len(x.descriptors))/ext4Block
		}
		used := x.used(g)
		free := min(ext4Group, x.blocks-g*ext4Group) - used
		x.free += free
		little.PutUint32(d, uint32(first))
		little.PutUint32(d[4:], uint32(first+1))
		little.PutUint32(d[8:], uint32(first+2))
		little.PutUint16(d[12:], uint16(free))
		little.PutUint16(d[14:], uint16(x.perGroup-min(x.perGroup, max(0, inodes-g*x.perGroup))))
	}
	for _, n := range x.order {
		if n.isDir() {
			d := x.descriptors[int64(n.slot-1)/x.perGroup*ext4Descriptor:]
			little.PutUint16(d[16:], little.Uint16(d[16:])+1)
		}
	}
}

// used returns the number of used blocks of a group, which are all at its beginning.
func (x *ext4) used(group int64) int64 {
	return min(ext4Group, max(x.head(group), x.end-group*ext4Group))
}

// ext4JournalBlocks returns the number of blocks of the journal that mke2fs would make.
func ext4JournalBlocks(blocks int64) int64 {
	for _, j := range [][2]int64{{32 << 10, 1 << 10}, {256 << 10, 4 << 10}, {512 << 10, 8 << 10}, {4096 << 10, 16 << 10}, {8192 << 10, 32 << 10}, {16384 << 10, 64 << 10}} {
		if blocks < j[0] {
			return j[1]
		}
	}
	return 256 << 10
}

// isBackup reports whether a group has a copy of the superblock: groups 0 and 1, and powers of 3, 5 and 7.
func isBackup(group int64) bool {
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < group {
			n *= base
		}
		if n == group {
			return true
		}
	}
	return group <= 1
}

func (x *ext4) descriptorBlocks() int64 { return align(x.groups*ext4Descriptor, ext4Block) / ext4Block }

// head returns the number of blocks at the beginning of a group that hold no files: superblock, descriptors, bitmaps
// and inodes.
func (x *ext4) head(group int64) int64 {
	n := 2 + x.perGroup/ext4PerBlock
	if isBackup(group) {
		n += 1 + x.descriptorBlocks()
	}
	return n
}

// An extent maps a range of a file's blocks to one of the file system's.
type extent struct{ logical, count, block uint32 }

// A place allocates blocks in order.
type place struct {
	*ext4
	at int64
}

// take allocates n blocks for a file's blocks from logical on.
func (p *place) take(logical, n int64) (list []extent) {
	for n > 0 {
		if p.at%ext4Group == 0 {
			p.at += p.head(p.at / ext4Group)
		}
		m := min(n, ext4Group-p.at%ext4Group)
		list = append(list, extent{uint32(logical), uint32(m), uint32(p.at)})
		logical, n, p.at = logical+m, n-m, p.at+m
	}
	return list
}

// A plan holds the blocks of a file: its attributes, the nodes of its extent tree from the lowest level up, and its
// data.
type plan struct {
	xattrs uint32 // block of the attributes, or 0
	levels [][]uint32
	data   []extent
}

// plan allocates the blocks of a file, beginning at p.at.
func (p *place) plan(n *inode) (l plan) {
	if n.rare != nil && len(n.rare.xattrs) > 0 {
		l.xattrs = p.take(0, 1)[0].block
	}
	from := p.at
	for nodes := []int(nil); ; {
		p.at, l.levels, l.data = from, nil, nil
		for _, count := range nodes {
			var level []uint32
			for range count {
				level = append(level, p.take(0, 1)[0].block)
			}
			l.levels = append(l.levels, level)
		}
		switch {
		case n.isSparse():
			if n.rare != nil {
				for _, r := range n.rare.runs {
					l.data = append(l.data, p.take(int64(r.chunk), int64(r.chunks))...)
				}
			}
		case n.isDir(), n.mode&typeMask == typeFile:
			l.data = p.take(0, align(n.size, ext4Block)>>ext4Bits)
		case n.mode&typeMask == typeSymlink && len(p.tree.Target(n.entry)) >= ext4Beside:
			l.data = p.take(0, 1)
		}
		// The nodes come before the data and so move them, which can change the number of extents by one. If fewer
		// nodes are needed now, the allocated ones stay, or this might never end.
		var need []int
		for count := len(l.data); count > ext4InRoot; need = append(need, count) {
			count = (count + ext4InNode - 1) / ext4InNode
		}
		if len(need) < len(nodes) || slices.Compare(need, nodes) <= 0 {
			return l
		}
		nodes = need
	}
}

// ext4Extents encodes a node of an extent tree at a height above the leaves, with its entries.
func ext4Extents(b []byte, height int, room int, entries []extent) {
	little.PutUint16(b, 0xf30a)
	little.PutUint16(b[2:], uint16(len(entries)))
	little.PutUint16(b[4:], uint16(room))
	little.PutUint16(b[6:], uint16(height))
	for i, e := range entries {
		d := b[12+12*i:]
		little.PutUint32(d, e.logical)
		if height > 0 {
			little.PutUint32(d[4:], e.block)
			continue
		}
		little.PutUint16(d[4:], uint16(e.count))
		little.PutUint32(d[8:], e.block)
	}
}

// extents returns the nodes of a file's extent tree in the order of their blocks, and encodes the root in beside.
func (l *plan) extents(beside []byte) (nodes [][]byte) {
	entries := l.data
	for height, level := range l.levels {
		var above []extent
		for i, block := range level {
			part := entries[i*len(entries)/len(level) : (i+1)*len(entries)/len(level)]
			b := make([]byte, ext4Block)
			ext4Extents(b, height, ext4InNode, part)
			nodes = append(nodes, b)
			above = append(above, extent{logical: part[0].logical, block: block})
		}
		entries = above
	}
	ext4Extents(beside, len(l.levels), ext4InRoot, entries)
	return nodes
}

// blocks counts the blocks of a plan.
func (l *plan) blocks() (n int64) {
	if l.xattrs > 0 {
		n++
	}
	for _, level := range l.levels {
		n += int64(len(level))
	}
	for _, e := range l.data {
		n += int64(e.count)
	}
	return n
}

// dirents returns the size of a directory's content. It calls f, unless that is nil, with each block.
func (x *ext4) dirents(dir *inode, f func(block []byte) error) (size int64, err error) {
	block := make([]byte, ext4Block)
	at, last := 0, 0
	end := func() {
		little.PutUint16(block[last+4:], uint16(ext4Block-last))
		if f != nil && err == nil {
			err = f(block)
		}
		clear(block)
		at, last, size = 0, 0, size+ext4Block
	}
	add := func(name []byte, n *inode) {
		length := int(align(int64(8+len(name)), 4))
		if at+length > ext4Block {
			end()
		}
		d := block[at:]
		little.PutUint32(d, n.slot)
		little.PutUint16(d[4:], uint16(length))
		d[6], d[7] = byte(len(name)), types[n.mode>>12]
		copy(d[8:], name)
		at, last = at+length, at
	}
	add([]byte("."), dir)
	add([]byte(".."), x.tree.File(x.tree.Parent(dir.entry)))
	x.names = x.tree.Children(dir.entry, x.names[:0])
	for _, e := range x.names {
		add(x.tree.Name(e), x.tree.File(e))
	}
	end()
	return size, err
}
