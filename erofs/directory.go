package erofs

import (
	"bytes"
	"slices"
)

// A dirent is a directory's entry in the image.
type dirent struct {
	name  []byte
	inode *inode
}

// list returns the entries of a directory, including "." and "..", in the order of their bytes.
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

// direntBlock returns how many entries of a list fit into one block, and how many bytes they take.
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

// dirents writes a range of a directory's content, as image.content does.
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

// types maps the type in a mode to the type in a dirent.
var types = [16]byte{typeFile >> 12: 1, typeDir >> 12: 2, typeChar >> 12: 3, typeBlock >> 12: 4, typeFifo >> 12: 5, typeSymlink >> 12: 7}

// direntsOf writes one block: its entries, then their names.
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
