package erofs

import (
	"strings"

	"distkit/layer"
)

const (
	maxHops = 40 // symbolic links followed for one path, as the kernel does

	// Symbolic links let a short name lead through many directories. All entries together may lead through so many: some, and
	// some more for each entry.
	linkedDirs, linkedDirsPerEntry = 1 << 16, 64

	// Bytes of memory that an inode, a name of one, and so on take, with what the map and the lists have for them. A file
	// with a name of 16 bytes takes 256.
	inodeMemory, nameMemory, dirMemory, rareMemory, runMemory = 96, 144, 160, 96, 32
)

// A tree is a file system in memory.
type tree struct {
	memory, maxMemory int64
	layer             uint16 // number of the layer that is being applied, from 1 on
	overlay           bool   // whiteouts are kept, as those of overlayfs
	linked            int    // directories that symbolic links may still lead through
	made              int64  // directories that are there only by what is in them

	root    *inode
	entries map[key]*entry
	last    struct { // the directory that was looked up last, while nothing was removed since
		path string
		dir  *inode
	}
}

// An inode is a file of any type.
type inode struct {
	mode        uint16 // with the type
	device      uint16 // of data: number of the layer whose plain archive holds it, 0 for the scratch file
	uid, gid    uint32
	seconds     int64
	nanoseconds uint32
	links       uint32
	number      uint32 // of a device
	size        int64
	offset      int64 // of data
	dir         *directory
	rare        *rare

	// Where it is in an image, once that is laid out.
	layout  uint8
	slot    uint32 // in units of 32 bytes from the beginning
	address uint32 // block of what is not beside the inode
}

// rare is what few inodes have.
type rare struct {
	target string
	xattrs []layer.Xattr
	runs   []run // of a sparse file
}

// A run is a range of a sparse file that is not a hole, in chunks.
type run struct {
	chunk, chunks uint32
	offset        int64 // in the scratch file
}

type directory struct {
	parent  *inode
	first   *entry
	path    uint16 // bytes of its path
	touched uint16 // the last layer that names it or adds to it
	opaque  bool   // in overlay form
	hidden  uint16 // number of the last layer for which hide() has run here
}

// An entry is a name in a directory. One without an inode was removed: it keeps its place for a file of the same name.
type entry struct {
	name  string
	inode *inode
	next  *entry
	layer uint16 // that put the file here
}

type key struct {
	dir  *inode
	name string
}

func newTree(maxMemory int64, overlay bool) *tree {
	t := &tree{maxMemory: maxMemory, overlay: overlay, linked: linkedDirs, entries: map[key]*entry{}}
	t.root = &inode{mode: typeDir | 0o755, links: 2, dir: &directory{}}
	t.root.dir.parent = t.root
	return t
}

func (n *inode) isDir() bool { return n.dir != nil }

// more returns what few inodes have, to be changed.
func (n *inode) more() *rare {
	if n.rare == nil {
		n.rare = &rare{}
	}
	return n.rare
}

// charge counts bytes of memory that the tree takes. They are not given back.
func (t *tree) charge(n int) error {
	if t.memory += int64(n); t.memory > t.maxMemory {
		return tooMuch("the image's files take more than %d bytes of memory", t.maxMemory)
	}
	return nil
}

func (t *tree) find(dir *inode, name string) *inode {
	if e := t.entries[key{dir, name}]; e != nil {
		return e.inode
	}
	return nil
}

// put gives the file n the name in dir, in place of what is there.
func (t *tree) put(dir *inode, name string, n *inode) error {
	e := t.entries[key{dir, name}]
	if e == nil {
		if err := t.charge(nameMemory + len(name)); err != nil {
			return err
		}
		name = strings.Clone(name) // and not the whole path that it is a part of
		e = &entry{name: name, next: dir.dir.first}
		dir.dir.first = e
		t.entries[key{dir, name}] = e
	} else if e.inode != nil {
		t.remove(dir, e)
	}
	e.inode, e.layer = n, t.layer
	if n.isDir() {
		dir.links++
	} else {
		n.links++
	}
	t.touch(dir)
	return nil
}

// check refuses a new name in dir that no file system can have.
func (t *tree) check(dir *inode, name string) error {
	if len(name) > maxName {
		return refused("a name of %d bytes in its path", len(name))
	}
	if n := int(dir.dir.path) + 1 + len(name); n > layer.MaxPath {
		return refused("it leads to a path of %d bytes", n)
	}
	return nil
}

// create returns a new file of the name in dir, in place of what is there. It has no attributes yet. In overlay form a directory
// in place of another file is opaque: what that hid of the lower layers must stay hidden.
func (t *tree) create(dir *inode, name string, mode uint16) (*inode, error) {
	if err := t.check(dir, name); err != nil {
		return nil, err
	}
	n := &inode{mode: mode}
	size := inodeMemory
	if mode&typeMask == typeDir {
		size += dirMemory
		n.links = 2
		n.dir = &directory{parent: dir, path: dir.dir.path + 1 + uint16(len(name)), touched: t.layer, hidden: t.layer, opaque: t.overlay && t.find(dir, name) != nil}
	}
	if err := t.charge(size); err != nil {
		return nil, err
	}
	return n, t.put(dir, name, n)
}

// remove removes a name, and all below a directory.
func (t *tree) remove(dir *inode, e *entry) {
	t.last.dir = nil
	n := e.inode
	e.inode = nil
	if !n.isDir() {
		n.links--
		return
	}
	dir.links--
	for c := n.dir.first; c != nil; c = c.next {
		if c.inode != nil {
			t.remove(n, c)
		}
		delete(t.entries, key{n, c.name})
	}
}

// touch records that a directory, and so those above it, are in this layer too.
func (t *tree) touch(dir *inode) {
	for dir.dir.touched != t.layer {
		dir.dir.touched = t.layer
		dir = dir.dir.parent
	}
}

// hide removes from dir what lower layers put there, and leaves what this layer put there.
func (t *tree) hide(dir *inode) {
	if dir.dir.hidden == t.layer {
		return
	}
	dir.dir.hidden = t.layer
	for e := dir.dir.first; e != nil; e = e.next {
		t.whiteout(dir, e)
	}
}

// whiteout removes a name as far as it is of lower layers.
func (t *tree) whiteout(dir *inode, e *entry) {
	switch {
	case e.inode == nil || e.layer == t.layer:
	case e.inode.isDir() && e.inode.dir.touched == t.layer:
		e.layer = t.layer
		t.hide(e.inode)
	default:
		t.remove(dir, e)
	}
}

// lookup returns the directory that a cleaned path leads to. Symbolic links are followed as if the root were that of the file system,
// and what is missing on the way is created, unless it must exist.
func (t *tree) lookup(p string, mustExist bool) (*inode, error) {
	if t.last.dir != nil && t.last.path == p {
		return t.last.dir, nil
	}
	dir, todo, hops := t.root, p, 0
	for todo != "" {
		var name string
		name, todo, _ = strings.Cut(todo, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			dir = dir.dir.parent
			continue
		}
		n := t.find(dir, name)
		switch {
		case n == nil && mustExist:
			return nil, errMissing
		case n == nil, n.isWhiteout() && !mustExist:
			var err error
			if n, err = t.create(dir, name, typeDir|0o755); err != nil {
				return nil, err
			}
			t.made++
		case n.isDir():
		case n.mode&typeMask == typeSymlink:
			target := n.rare.target
			if hops++; hops > maxHops {
				return nil, refused("more than %d symbolic links in a path", maxHops)
			}
			if t.linked -= 1 + strings.Count(target, "/"); t.linked < 0 {
				return nil, refused("symbolic links lead through too many directories: more than %d and %d for each entry", linkedDirs, linkedDirsPerEntry)
			}
			if todo = target + "/" + todo; len(todo) > 2*layer.MaxPath {
				return nil, refused("symbolic links lead to a path of %d bytes", len(todo))
			}
			if target[0] == '/' {
				dir = t.root
			}
			continue
		default:
			return nil, refused("%.200q is not a directory", name)
		}
		dir = n
	}
	t.last.path, t.last.dir = p, dir
	return dir, nil
}
