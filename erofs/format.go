package erofs

import (
	"encoding/binary"
	"hash/crc32"
)

// Sizes, offsets and values of the format, from the kernel's fs/erofs/erofs_fs.h.
const (
	magic       = 0xe0f5e1e2
	superOffset = 1024
	superSize   = 128
	deviceSize  = 128
	inodeSize   = 64 // of an extended inode; compact ones are not written
	direntSize  = 12
	chunkSize   = 8 // of a chunk's address
	slotSize    = 32
	nullAddress = 1<<32 - 1

	compatChecksum, compatMtime    = 1, 2
	incompatChunked, incompatTable = 4, 8

	layoutPlain, layoutInline, layoutChunks = 0, 2, 4
	chunkIndexes                            = 0x20
	maxChunkBits                            = 31

	maxName = 255

	xattrHeader, xattrEntry = 12, 4
	maxXattrs               = 4 * (1<<16 - 2) // bytes of all attributes of an inode
)

// Types of files, as in st_mode.
const (
	typeMask    = 0o170000
	typeFifo    = 0o010000
	typeChar    = 0o020000
	typeDir     = 0o040000
	typeBlock   = 0o060000
	typeFile    = 0o100000
	typeSymlink = 0o120000
)

var little = binary.LittleEndian

// A superblock holds the fields that differ between images.
type superblock struct {
	blockBits uint8
	root      uint16
	inodes    uint64
	blocks    uint32
	uuid      [16]byte
	chunked   bool
	devices   []device
}

// A device is a file that holds data outside the image.
type device struct {
	tag    string // the diff ID of the layer, in hexadecimal
	blocks uint32
}

// encode writes the superblock and the table of devices into b, which holds the image's first block, or as many blocks
// as the two take.
func (s *superblock) encode(b []byte) {
	d := b[superOffset:]
	little.PutUint32(d, magic)
	little.PutUint32(d[8:], compatMtime)
	d[12] = s.blockBits
	little.PutUint16(d[14:], s.root)
	little.PutUint64(d[16:], s.inodes)
	little.PutUint32(d[36:], s.blocks)
	copy(d[48:], s.uuid[:])
	incompat := uint32(0)
	if s.chunked {
		incompat |= incompatChunked
	}
	if len(s.devices) > 0 {
		incompat |= incompatTable
		little.PutUint16(d[86:], uint16(len(s.devices)))
		little.PutUint16(d[88:], (superOffset+superSize)/deviceSize)
	}
	little.PutUint32(d[80:], incompat)
	for i, dev := range s.devices {
		slot := d[superSize+i*deviceSize:]
		copy(slot[:64], dev.tag)
		little.PutUint32(slot[64:], dev.blocks)
	}
	// The checksum covers the rest of the first block. An image whose block is too small to hold the superblock gets
	// none: fsck.erofs 1.8 crashes on it, and mkfs.erofs writes none either.
	if n := 1 << s.blockBits; n > superOffset {
		little.PutUint32(d[8:], compatChecksum|compatMtime)
		little.PutUint32(d[4:], ^crc32.Checksum(b[superOffset:n], crc32.MakeTable(crc32.Castagnoli)))
	}
}

// encodeInode writes an inode. size is the number of bytes of its content, xattrs that of its attributes. union is the
// field whose meaning depends on type and layout. number is the inode number for systems where it has 32 bits.
func encodeInode(b []byte, n *inode, size int64, xattrs int64, union, number uint32) {
	little.PutUint16(b, 1|uint16(n.layout)<<1)
	little.PutUint16(b[2:], 0)
	if xattrs > 0 {
		little.PutUint16(b[2:], uint16((xattrs-xattrHeader)/4+1))
	}
	little.PutUint16(b[4:], n.mode)
	little.PutUint64(b[8:], uint64(size))
	little.PutUint32(b[16:], union)
	little.PutUint32(b[20:], number)
	little.PutUint32(b[24:], n.uid)
	little.PutUint32(b[28:], n.gid)
	little.PutUint64(b[32:], uint64(n.seconds))
	little.PutUint32(b[40:], n.nanoseconds)
	little.PutUint32(b[44:], n.links)
}
