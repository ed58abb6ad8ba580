package erofs

import (
	"distkit/layer"
	"distkit/layer/tree"
)

// Bytes of memory that an attribute, and what few inodes have, take beside names and values; and a run.
const rareMemory, runMemory = 96, 32

// An inode is a file of any type.
type inode struct {
	mode        uint16 // with the type
	device      uint16 // of data: number of the layer whose plain archive holds it, 0 for the scratch file
	uid, gid    uint32
	seconds     int64
	nanoseconds uint32
	number      uint32 // of a device
	size        int64
	offset      int64 // of data
	rare        *rare

	// What is known once the file is laid out in an image.
	entry   tree.Entry // one of its names
	links   uint32
	slot    uint32 // in units of 32 bytes from the beginning
	address uint32 // block of what is not beside the inode
	layout  uint8
	opaque  bool // a directory, in overlay form
}

// rare is what few inodes have.
type rare struct {
	xattrs []layer.Xattr
	runs   []run // of a sparse file
}

// A run is a range of a sparse file that is not a hole, in chunks.
type run struct {
	chunk, chunks uint32
	offset        int64 // in the scratch file
}

func newTree(opts Options) *tree.Tree[inode] {
	return tree.New(tree.Options[inode]{MaxMemory: opts.MaxMemory, Whiteouts: opts.Overlay, New: func(k tree.Kind, n *inode) {
		switch n.mode = uint16(k) << 12; k {
		case tree.Dir:
			n.mode |= 0o755
		case tree.Whiteout:
			n.mode = typeChar
		}
	}})
}

func (n *inode) isDir() bool { return n.mode&typeMask == typeDir }

// more returns what few inodes have, to be changed.
func (n *inode) more() *rare {
	if n.rare == nil {
		n.rare = &rare{}
	}
	return n.rare
}
