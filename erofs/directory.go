package erofs

import (
	"bytes"
	"slices"
)

// A dirent is a name in a directory of an image.
type dirent struct {
	name  []byte
	inode *inode
}

// list returns the names in a directory in the order of their bytes, with those for itself and its parent.
func (im *image) list(n *inode) []dirent {
	im.names = im.tree.Children(n.entry, im.names[:0])
	list := make([]dirent, 0, len(im.names)+2)
	for _, e := range im.names {
		list = append(list, dirent{im.tree.Name(e), im.tree.File(e)})
	}
	for _, d := range []dirent{{[]byte("."), n}, {[]byte(".."), im.tree.File(im.tree.Parent(n.entry))}} {
		i, _ := slices.BinarySearchFunc(list, d.name, func(d dirent, name []byte) int { return bytes.Compare(d.name, name) })
		list = slices.Insert(list, i, d)
	}
	return list
}

// direntBlock returns how many names of a list one block holds, and the bytes that they take.
func (im *image) direntBlock(list []dirent) (count int, size int64) {
	for _, d := range list {
		n := int64(direntSize + len(d.name))
		if size+n > im.block {
			break
		}
		count, size = count+1, size+n
	}
	return count, size
}

// direntsSize returns the number of bytes of a directory's content.
func (im *image) direntsSize(list []dirent) int64 {
	for size := int64(0); ; size += im.block {
		count, used := im.direntBlock(list)
		if list = list[count:]; len(list) == 0 {
			return size + used
		}
	}
}

// dirents writes a directory's content, as content does.
func (im *image) dirents(n *inode, from, to int64) error {
	list := im.list(n)
	for at := int64(0); at < to; at += im.block {
		count, used := im.direntBlock(list)
		if at >= from {
			if err := im.direntsOf(list[:count], used); err != nil {
				return err
			}
			if err := im.out.pad(im.out.written + min(im.block, to-at) - used); err != nil {
				return err
			}
		}
		list = list[count:]
	}
	return nil
}

// types are those of directory entries, by that of the mode.
var types = [16]byte{typeFile >> 12: 1, typeDir >> 12: 2, typeChar >> 12: 3, typeBlock >> 12: 4, typeFifo >> 12: 5, typeSymlink >> 12: 7}

// direntsOf writes one block's entries, and then their names.
func (im *image) direntsOf(list []dirent, used int64) error {
	names := used
	for _, d := range list {
		names -= int64(len(d.name))
	}
	for _, d := range list {
		var b [direntSize]byte
		little.PutUint64(b[:], uint64(d.inode.slot))
		little.PutUint16(b[8:], uint16(names))
		b[10] = types[d.inode.mode>>12]
		if err := im.out.write(b[:]); err != nil {
			return err
		}
		names += int64(len(d.name))
	}
	for _, d := range list {
		if err := im.out.write(d.name); err != nil {
			return err
		}
	}
	return nil
}
