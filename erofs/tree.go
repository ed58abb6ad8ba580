package erofs

import (
	"distkit/layer"
	"distkit/layer/tree"
)

// Memory in bytes, beside names and values: of an attribute or a rare, and of a run.
const rareMemory, runMemory = 96, 32

// An inode is a file of any type. It can have several names.
type inode struct {
	mode        uint16 // including the type
	device      uint16 // of a regular file: the number of the layer whose plain archive holds its data, or 0 for the scratch file
	uid, gid    uint32
	seconds     int64
	nanoseconds uint32
	number      uint32 // of a device: its number
	size        int64
	offset      int64 // of the data
	rare        *rare

	// The fields from here on are set when the file is laid out in an image.
	entry   tree.Entry // one of its names
	links   uint32
	slot    uint32 // EROFS: offset in the image in units of 32 bytes; ext4: inode number
	address uint32 // first block of the content, unless all of it is inline
	layout  uint8
	opaque  bool // of a directory, in overlay form
}

// rare holds the fields that few inodes need.
type rare struct {
	xattrs []layer.Xattr
	runs   []run // of a sparse file
}

// A run is a range of chunks of a sparse file that has no hole.
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

// more returns n.rare for writing. It allocates it if need be.
func (n *inode) more() *rare {
	if n.rare == nil {
		n.rare = &rare{}
	}
	return n.rare
}
