package erofs

import (
	"iter"
	"slices"
	"strings"
)

// sort puts the entries of a directory in the order of their names' bytes, adds those for itself and its parent, and forgets those
// that were removed.
func (d *directory) sort(self *inode) {
	list := []*entry{{name: ".", inode: self}, {name: "..", inode: d.parent}}
	for e := d.first; e != nil; e = e.next {
		if e.inode != nil {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b *entry) int { return strings.Compare(a.name, b.name) })
	d.first = nil
	for _, e := range slices.Backward(list) {
		e.next, d.first = d.first, e
	}
}

// each yields the entries of a sorted directory but those for itself and its parent.
func (d *directory) each() iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		for e := d.first; e != nil; e = e.next {
			if e.name != "." && e.name != ".." && !yield(e) {
				return
			}
		}
	}
}

// direntBlock returns the last of the entries from one on that one block holds, and the bytes that they take.
func (im *image) direntBlock(from *entry) (last *entry, size int64) {
	for e := from; e != nil; e = e.next {
		n := int64(direntSize + len(e.name))
		if size+n > im.block {
			break
		}
		last, size = e, size+n
	}
	return last, size
}

// direntsSize returns the number of bytes of a sorted directory's content.
func (im *image) direntsSize(n *inode) int64 {
	for e, size := n.dir.first, int64(0); ; {
		last, used := im.direntBlock(e)
		if e = last.next; e == nil {
			return size + used
		}
		size += im.block
	}
}

// dirents writes a directory's content, as content does.
func (im *image) dirents(n *inode, from, to int64) error {
	for e, at := n.dir.first, int64(0); at < to; at += im.block {
		last, used := im.direntBlock(e)
		if at >= from {
			if err := im.direntsOf(e, last, used); err != nil {
				return err
			}
			if err := im.out.pad(im.out.written + min(im.block, to-at) - used); err != nil {
				return err
			}
		}
		e = last.next
	}
	return nil
}

// types are those of directory entries, by that of the mode.
var types = [16]byte{typeFile >> 12: 1, typeDir >> 12: 2, typeChar >> 12: 3, typeBlock >> 12: 4, typeFifo >> 12: 5, typeSymlink >> 12: 7}

// direntsOf writes one block's entries, and then their names.
func (im *image) direntsOf(first, last *entry, used int64) error {
	names := used
	for e := first; e != last.next; e = e.next {
		names -= int64(len(e.name))
	}
	for e := first; e != last.next; e = e.next {
		var b [direntSize]byte
		little.PutUint64(b[:], uint64(e.inode.slot))
		little.PutUint16(b[8:], uint16(names))
		b[10] = types[e.inode.mode>>12]
		if err := im.out.write(b[:]); err != nil {
			return err
		}
		names += int64(len(e.name))
	}
	for e := first; e != last.next; e = e.next {
		if err := im.out.write([]byte(e.name)); err != nil {
			return err
		}
	}
	return nil
}
