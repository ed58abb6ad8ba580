package erofs

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"

	"distkit/layer/tree"
)

const (
	tarBits   = 9  // log2 of an index's block size, which is that of a tar archive
	blockBits = 12 // log2 of a complete image's block size

	headSize = superOffset + superSize
)

// An image lays out a Builder's tree and writes it in this order: superblock and table of devices; inodes, each with
// its attributes and then the addresses of its chunks or the tail of its content; whole blocks of content.
type image struct {
	*Builder
	bits    uint8
	block   int64
	order   []*inode     // inodes by slot
	names   []tree.Entry // reused for the entries of a directory
	next    int64        // first free byte for an inode
	blocks  int64
	chunked bool
	out     output
}

// Write writes the image to w. After it only Close may be called. FailedPrecondition: the format can't hold the image.
// NotImplemented: something was left out, and Options.Strict is set.
func (b *Builder) Write(ctx context.Context, w io.Writer) error {
	if err := b.strict(); err != nil {
		return err
	}
	im := &image{Builder: b, bits: blockBits}
	if b.opts.Index {
		im.bits = tarBits
	}
	im.block = 1 << im.bits
	s := superblock{blockBits: im.bits, uuid: b.UUID(fmt.Sprintf("%t %t", b.opts.Index, b.opts.Overlay))}
	if b.opts.Index {
		for _, l := range b.layers {
			blocks := align(l.size, im.block) >> im.bits
			if blocks > nullAddress {
				return tooMuch("a layer has more than %d bytes", int64(nullAddress)<<im.bits)
			}
			s.devices = append(s.devices, device{tag: l.diffID.Encoded(), blocks: uint32(blocks)})
		}
	}
	head := align(int64(headSize+len(s.devices)*deviceSize), im.block) // the checksum covers whole blocks
	if err := im.layout(head); err != nil {
		return err
	}
	s.root, s.inodes, s.blocks, s.chunked = uint16(b.tree.File(tree.Root).slot), uint64(len(im.order)), uint32(im.blocks), im.chunked
	first := make([]byte, head)
	s.encode(first)
	im.out = output{ctx: ctx, w: w, buffer: make([]byte, 0, bufferSize)}
	if err := im.out.write(first); err != nil {
		return err
	}
	if err := im.inodes(); err != nil {
		return err
	}
	if err := im.contents(); err != nil {
		return err
	}
	return im.out.flush()
}

// layout assigns a place to every inode, beginning at byte from, and to all content.
func (im *image) layout(from int64) error {
	im.next = from
	im.place(tree.Root)
	im.placeAll(tree.Root)
	if im.next/slotSize > math.MaxUint32 {
		return tooMuch("the image's inodes take more than %d bytes", int64(math.MaxUint32)*slotSize)
	}
	address := align(im.next, im.block) >> im.bits
	for _, n := range im.order {
		n.address = uint32(address)
		if address += im.contentBlocks(n); address >= nullAddress {
			return tooMuch("the image has more than %d bytes", int64(nullAddress)<<im.bits)
		}
	}
	im.blocks = address
	return nil
}

// placeAll places the inodes below a directory. Those of its entries are adjacent, since they are usually read
// together.
func (im *image) placeAll(dir tree.Entry) {
	list := im.tree.Children(dir, nil)
	for _, e := range list {
		if im.tree.File(e).slot == 0 { // not placed yet under another name
			im.place(e)
		}
	}
	for _, e := range list {
		if im.tree.Kind(e) == tree.Dir {
			im.placeAll(e)
		}
	}
}

// place lays out the inode of e's file, and what follows it.
func (im *image) place(e tree.Entry) {
	n := im.tree.File(e)
	n.entry, n.links = e, im.tree.Links(e)
	if n.isDir() {
		list := im.list(n)
		n.size, n.links = im.direntsSize(list), 0
		for _, d := range list {
			if d.inode.isDir() {
				n.links++
			}
		}
		n.opaque = im.tree.Opaque(e)
	}
	size := inodeSize + n.xattrsSize()
	at := im.next
	if at%im.block+inodeSize > im.block {
		at = align(at, im.block)
	}
	switch tail := im.size(n) % im.block; {
	case im.isChunked(n):
		im.chunked = true
		n.layout = layoutChunks
		size = align(size, chunkSize) + chunkSize*im.chunkCount(n)
	case tail > 0:
		// The tail must lie within one block. If it does not fit after the inode, either the inode begins in the next
		// block, or the tail gets a block of its own, whichever wastes less.
		rest := im.block - at%im.block
		switch {
		case (at+size)%im.block+tail <= im.block:
			n.layout = layoutInline
		case size%im.block+tail <= im.block && rest < im.block-tail:
			at += rest
			n.layout = layoutInline
		}
		if n.layout == layoutInline {
			size += tail
		}
	}
	n.slot = uint32(at / slotSize)
	im.next = align(at+size, slotSize)
	im.order = append(im.order, n)
}

// size returns the number of bytes of a file's content.
func (im *image) size(n *inode) int64 {
	if n.mode&typeMask == typeSymlink {
		return int64(len(im.tree.Target(n.entry)))
	}
	return n.size
}

// isSparse reports whether n is a regular file whose content is in the scratch file, in chunks.
func (n *inode) isSparse() bool { return n.mode&typeMask == typeFile && n.device == 0 && n.size > 0 }

// isChunked reports whether addresses of chunks follow the file's inode.
func (im *image) isChunked(n *inode) bool {
	return n.isSparse() || im.opts.Index && n.mode&typeMask == typeFile && n.size > 0
}

// chunkBits returns log2 of the number of blocks in a chunk. A file in a plain archive is a single chunk, if a chunk
// can be that large.
func (im *image) chunkBits(n *inode) uint8 {
	if n.isSparse() {
		return sparseBits - im.bits
	}
	bits := uint8(0)
	for im.block<<bits < n.size && bits < maxChunkBits {
		bits++
	}
	return bits
}

func (im *image) chunkCount(n *inode) int64 {
	size := im.block << im.chunkBits(n)
	return align(n.size, size) / size
}

// contentBlocks returns the number of blocks of content that are not inline after the inode.
func (im *image) contentBlocks(n *inode) int64 {
	switch n.layout {
	case layoutInline:
		return im.size(n) >> im.bits
	case layoutPlain:
		return align(im.size(n), im.block) >> im.bits
	}
	blocks := int64(0)
	if n.rare != nil {
		for _, r := range n.rare.runs {
			blocks += int64(r.chunks) << (sparseBits - im.bits)
		}
	}
	return blocks
}

// inodes writes all inodes and what follows each of them.
func (im *image) inodes() error {
	var b [inodeSize]byte
	for i, n := range im.order {
		if err := im.out.pad(int64(n.slot) * slotSize); err != nil {
			return err
		}
		xattrs := n.xattrsSize()
		encodeInode(b[:], n, im.size(n), xattrs, im.union(n), uint32(i+1))
		if err := im.out.write(b[:]); err != nil {
			return err
		}
		if xattrs > 0 {
			if err := im.xattrs(n); err != nil {
				return err
			}
		}
		var err error
		switch n.layout {
		case layoutChunks:
			err = im.addresses(n)
		case layoutInline:
			size := im.size(n)
			err = im.content(n, size&^(im.block-1), size)
		}
		if err != nil {
			return err
		}
	}
	return im.out.pad(align(im.out.written, im.block))
}

// union returns the inode's field whose meaning depends on type and layout.
func (im *image) union(n *inode) uint32 {
	switch n.mode & typeMask {
	case typeChar, typeBlock:
		return n.number
	}
	if n.layout == layoutChunks {
		return chunkIndexes | uint32(im.chunkBits(n))
	}
	return n.address
}

// addresses writes the addresses of a file's chunks.
func (im *image) addresses(n *inode) error {
	if err := im.out.pad(align(im.out.written, chunkSize)); err != nil {
		return err
	}
	address := func(device uint16, block uint32) error {
		var b [chunkSize]byte
		little.PutUint16(b[2:], device)
		little.PutUint32(b[4:], block)
		return im.out.write(b[:])
	}
	count, bits := uint32(im.chunkCount(n)), im.chunkBits(n)
	if !n.isSparse() {
		for i := range count {
			if err := address(n.device, uint32(n.offset>>im.bits)+i<<bits); err != nil {
				return err
			}
		}
		return nil
	}
	block, chunk := n.address, uint32(0)
	for _, r := range append(n.rare.runs, run{chunk: count}) {
		for ; chunk < r.chunk; chunk++ {
			if err := address(0, nullAddress); err != nil {
				return err
			}
		}
		for ; chunk < r.chunk+r.chunks; chunk++ {
			if err := address(0, block); err != nil {
				return err
			}
			block += 1 << bits
		}
	}
	return nil
}

// contents writes the whole blocks of content.
func (im *image) contents() error {
	for _, n := range im.order {
		var err error
		switch size := im.size(n); n.layout {
		case layoutInline:
			err = im.content(n, 0, size&^(im.block-1))
		case layoutPlain:
			err = im.content(n, 0, size)
		case layoutChunks:
			if n.rare == nil {
				continue
			}
			for _, r := range n.rare.runs {
				if err := im.out.copy(im.chunks, r.offset, int64(r.chunks)<<sparseBits); err != nil {
					return err
				}
			}
		}
		if err != nil {
			return err
		}
		if err := im.out.pad(align(im.out.written, im.block)); err != nil {
			return err
		}
	}
	return nil
}

// content writes a file's content from one block boundary to another, or to the end.
func (im *image) content(n *inode, from, to int64) error {
	switch {
	case from == to:
		return nil
	case n.isDir():
		return im.dirents(n, from, to)
	case n.mode&typeMask == typeSymlink:
		return im.out.write([]byte(im.tree.Target(n.entry)[from:to]))
	}
	return im.out.copy(im.plain, im.layers[n.device-1].offset+n.offset+from, to-from)
}

// An output writes the image in order.
type output struct {
	ctx     context.Context
	w       io.Writer
	buffer  []byte
	written int64
}

var padding [1 << blockBits]byte

func (o *output) flush() error {
	if err := o.ctx.Err(); err != nil {
		return err
	}
	_, err := o.w.Write(o.buffer)
	o.buffer = o.buffer[:0]
	return err
}

// Write implements io.Writer.
func (o *output) Write(b []byte) (int, error) {
	if err := o.write(b); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (o *output) write(b []byte) error {
	o.written += int64(len(b))
	for len(b) > 0 {
		if len(o.buffer) == cap(o.buffer) {
			if err := o.flush(); err != nil {
				return err
			}
		}
		n := copy(o.buffer[len(o.buffer):cap(o.buffer)], b)
		o.buffer, b = o.buffer[:len(o.buffer)+n], b[n:]
	}
	return nil
}

// hole writes n zeros. In a regular file it leaves a hole instead.
func (o *output) hole(n int64) error {
	if f, ok := o.w.(*os.File); ok && n > int64(cap(o.buffer)) {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			if err := o.flush(); err != nil {
				return err
			}
			o.written += n
			_, err := f.Seek(n, io.SeekCurrent)
			return err
		}
	}
	for n > 0 {
		part := min(n, int64(len(padding)))
		if err := o.write(padding[:part]); err != nil {
			return err
		}
		n -= part
	}
	return nil
}

// end extends a regular file that ends with a hole.
func (o *output) end() error {
	if err := o.flush(); err != nil {
		return err
	}
	if f, ok := o.w.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil || at <= info.Size() {
				return err
			}
			return f.Truncate(at)
		}
	}
	return nil
}

// pad writes zeros up to offset to, at most a block away.
func (o *output) pad(to int64) error { return o.write(padding[:to-o.written]) }

// copy writes n bytes of a file from an offset on.
func (o *output) copy(f *os.File, offset, n int64) error {
	o.written += n
	for n > 0 {
		if len(o.buffer) == cap(o.buffer) {
			if err := o.flush(); err != nil {
				return err
			}
		}
		b := o.buffer[len(o.buffer):cap(o.buffer)]
		b = b[:min(int64(len(b)), n)]
		if _, err := f.ReadAt(b, offset); err != nil {
			return fmt.Errorf("read temporary file: %w", err)
		}
		o.buffer = o.buffer[:len(o.buffer)+len(b)]
		offset, n = offset+int64(len(b)), n-int64(len(b))
	}
	return nil
}
