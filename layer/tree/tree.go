// Package tree merges layers in memory, as the image specification's "Applying Changesets" says: whiteouts, opaque directories and
// hard links to files of lower layers are resolved, and symbolic links are followed as if the image's root were that of the file system.
//
// A tree takes some 35 bytes for a name beside the name itself and what its user keeps of a file.
package tree

import (
	"bytes"
	"errors"
	"hash/maphash"
	"reflect"
	"slices"
	"strings"

	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
)

const (
	maxName = 255
	maxHops = 40 // symbolic links followed for one path, as the kernel does

	// Symbolic links let a short name lead through many directories. All entries together may lead through so many: some, and
	// some more for each entry.
	linkedDirs, linkedDirsPerEntry = 1 << 16, 64

	// Bytes of memory that a name and so on take, with what the lists and the index have for them.
	nameMemory, dirMemory, symlinkMemory, linksMemory = 28, 24, 48, 48
)

// A Kind is the type of a file: that of st_mode, without its low 12 bits.
type Kind uint8

// Kinds of files.
const (
	Gone     Kind = 0 // a name that was removed
	FIFO     Kind = 1
	Char     Kind = 2
	Dir      Kind = 4
	Block    Kind = 6
	Regular  Kind = 8
	Symlink  Kind = 10
	Whiteout Kind = 15 // of the lower layers' file of the name, in a tree with Options.Whiteouts
)

// An Entry is a name in a directory.
type Entry uint32

// Root is the root directory, which has no name.
const Root Entry = 0

// Options of a Tree.
type Options[F any] struct {
	// MaxMemory bounds the bytes of memory that the tree takes. 0 is no bound.
	MaxMemory int64
	// Whiteouts keeps whiteouts, and marks directories as opaque, in the form of overlayfs. It is for a tree of one layer.
	Whiteouts bool
	// New is called with each new file. Directories that no entry names are new files too.
	New func(Kind, *F)
	// Removed is called with each file whose last name is removed or replaced, while that is still there, but not with a directory. It may be nil.
	Removed func(Entry, *F)
	// Deleted is called with each name that a layer deletes from those below, but not with the names below a directory. It may be nil.
	Deleted func(Entry)
}

// A Tree is a file system of the layers that were applied. It keeps an F of each file.
type Tree[F any] struct {
	opts    Options[F]
	size    int64 // of an F
	memory  int64
	layer   uint16 // number of the layer that is being applied, from 1 on
	entries int64
	made    int64
	linked  int // directories that symbolic links may still lead through

	nodes    list[node]
	names    names
	index    index
	files    list[F]
	dirs     list[directory]
	symlinks list[symlink]
	links    map[uint32]uint32 // names of files that have several
	last     struct {          // the directory that was looked up last, while nothing was removed since
		path  string
		dir   uint32
		known bool
	}
}

// A node is what an entry is. One without a kind was removed: it keeps its place for a file of the same name.
type node struct {
	parent uint32 // number of the directory
	next   uint32 // entry of the same directory, 0 for none
	what   uint32 // number of the directory, the symbolic link or the file
	layer  uint16 // that put the file here, or removed it
	kind   Kind
}

type directory struct {
	self    Entry
	file    uint32
	first   uint32 // entry
	path    uint16 // bytes of its path
	touched uint16 // the last layer that names it or adds to it
	hidden  uint16 // number of the last layer for which hide has run here
	opaque  bool   // in overlay form
}

type symlink struct {
	target string
	file   uint32
}

// New returns a Tree that has a root directory only.
func New[F any](opts Options[F]) *Tree[F] {
	t := &Tree[F]{opts: opts, size: int64(reflect.TypeFor[F]().Size()), linked: linkedDirs, links: map[uint32]uint32{}}
	t.index.seed = maphash.MakeSeed()
	t.nodes.add(node{kind: Dir})
	t.names.add("")
	t.dirs.add(directory{file: t.newFile(Dir)})
	return t
}

// NextLayer begins a layer on top of those before.
func (t *Tree[F]) NextLayer() { t.layer++ }

// Entries returns the number of entries that were applied, and of the directories that none of them names, together.
func (t *Tree[F]) Entries() int64 { return t.entries + t.made }

// Charge counts bytes of memory that the user keeps for files. They are not given back. FailedPrecondition: the tree would take more
// than Options.MaxMemory.
func (t *Tree[F]) Charge(n int64) error {
	if t.memory += n; t.opts.MaxMemory > 0 && t.memory > t.opts.MaxMemory {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "the image's files take more than %d bytes of memory", t.opts.MaxMemory)
	}
	return nil
}

// Kind returns the kind of a name's file.
func (t *Tree[F]) Kind(e Entry) Kind { return t.node(e).kind }

// Layer returns the number of the layer that put a file under this name, gave a directory its attributes, or removed the name: from 1
// on. It is 0 for the root directory while no layer names it.
func (t *Tree[F]) Layer(e Entry) int { return int(t.node(e).layer) }

// Name returns the last part of a path. The bytes must not be changed.
func (t *Tree[F]) Name(e Entry) []byte { return t.names.at(uint32(e)) }

// Parent returns the directory of a name. The root directory is its own parent.
func (t *Tree[F]) Parent(e Entry) Entry { return t.dirs.at(t.node(e).parent).self }

// File returns what is kept of a name's file.
func (t *Tree[F]) File(e Entry) *F { return t.files.at(t.number(e)) }

// Target returns what a symbolic link holds.
func (t *Tree[F]) Target(e Entry) string { return t.symlinks.at(t.node(e).what).target }

// Opaque reports whether a directory hides those of lower layers, in overlay form.
func (t *Tree[F]) Opaque(e Entry) bool { return t.dirs.at(t.node(e).what).opaque }

// Links returns the number of names that a file has which is no directory.
func (t *Tree[F]) Links(e Entry) uint32 {
	if n := t.links[t.number(e)]; n > 1 {
		return n
	}
	return 1
}

// Path returns the path of a name, without a slash before it.
func (t *Tree[F]) Path(e Entry) string {
	var parts [][]byte
	for ; e != Root; e = t.Parent(e) {
		parts = append(parts, t.Name(e))
	}
	slices.Reverse(parts)
	return string(bytes.Join(parts, []byte("/")))
}

// Children appends the names in a directory to list, in the order of their bytes.
func (t *Tree[F]) Children(e Entry, list []Entry) []Entry {
	from := len(list)
	for c := t.dirs.at(t.node(e).what).first; c != 0; c = t.nodes.at(c).next {
		if t.nodes.at(c).kind != Gone {
			list = append(list, Entry(c))
		}
	}
	slices.SortFunc(list[from:], func(a, b Entry) int { return bytes.Compare(t.Name(a), t.Name(b)) })
	return list
}

func (t *Tree[F]) node(e Entry) *node { return t.nodes.at(uint32(e)) }

// number returns the number of a name's file.
func (t *Tree[F]) number(e Entry) uint32 {
	n := t.node(e)
	switch n.kind {
	case Dir:
		return t.dirs.at(n.what).file
	case Symlink:
		return t.symlinks.at(n.what).file
	}
	return n.what
}

func (t *Tree[F]) newFile(kind Kind) uint32 {
	var f F
	if t.opts.New != nil {
		t.opts.New(kind, &f)
	}
	return t.files.add(f)
}

// find returns the entry of a name, which may be gone, or 0.
func (t *Tree[F]) find(dir uint32, name string) Entry {
	key := []byte(name)
	return Entry(t.index.find(t.index.hash(dir, key), func(e uint32) bool {
		return t.nodes.at(e).parent == dir && string(t.names.at(e)) == name
	}))
}

// put gives a file the name in dir, in place of what is there.
func (t *Tree[F]) put(dir uint32, name string, kind Kind, what uint32) (Entry, error) {
	e := t.find(dir, name)
	if e == 0 {
		if t.nodes.n == maxEntries {
			return 0, errclass.Errorf(errdefs.ErrFailedPrecondition, "more than %d names", maxEntries)
		}
		if t.names.full() {
			return 0, errclass.As(errors.New("names of 4 GiB together"), errdefs.ErrFailedPrecondition)
		}
		if err := t.Charge(int64(nameMemory + len(name))); err != nil {
			return 0, err
		}
		d := t.dirs.at(dir)
		d.first = t.nodes.add(node{parent: dir, next: d.first})
		e = Entry(d.first)
		t.names.add(name)
		t.index.add(t.index.hash(dir, []byte(name)), uint32(e), func(n uint32) uint64 { return t.index.hash(t.nodes.at(n).parent, t.names.at(n)) })
	} else {
		t.remove(e)
	}
	n := t.node(e)
	n.kind, n.what, n.layer = kind, what, t.layer
	t.touch(dir)
	return e, nil
}

// check refuses a new name in dir that no file system can have.
func (t *Tree[F]) check(dir uint32, name string) error {
	if len(name) > maxName {
		return refused("a name of %d bytes in its path", len(name))
	}
	if n := int(t.dirs.at(dir).path) + 1 + len(name); n > layer.MaxPath {
		return refused("it leads to a path of %d bytes", n)
	}
	return nil
}

// create makes a new file of the name in dir, in place of what is there. In overlay form a directory in place of another file is
// opaque: what that hid of the lower layers must stay hidden.
func (t *Tree[F]) create(dir uint32, name string, kind Kind, target string) (Entry, error) {
	if err := t.check(dir, name); err != nil {
		return 0, err
	}
	size := t.size
	switch kind {
	case Dir:
		size += dirMemory
	case Symlink:
		size += symlinkMemory + int64(len(target))
	}
	if err := t.Charge(size); err != nil {
		return 0, err
	}
	what := t.newFile(kind)
	switch kind {
	case Symlink:
		what = t.symlinks.add(symlink{strings.Clone(target), what})
	case Dir:
		e := t.find(dir, name)
		what = t.dirs.add(directory{file: what, path: t.dirs.at(dir).path + 1 + uint16(len(name)), touched: t.layer, hidden: t.layer,
			opaque: t.opts.Whiteouts && e != 0 && t.node(e).kind != Gone})
	}
	e, err := t.put(dir, name, kind, what)
	if err == nil && kind == Dir {
		t.dirs.at(what).self = e
	}
	return e, err
}

// link gives a file another name.
func (t *Tree[F]) link(dir uint32, name string, to Entry) (Entry, error) {
	if err := t.check(dir, name); err != nil {
		return 0, err
	}
	n, number := *t.node(to), t.number(to)
	if _, several := t.links[number]; !several {
		if err := t.Charge(linksMemory); err != nil {
			return 0, err
		}
		t.links[number] = 1
	}
	t.links[number]++
	return t.put(dir, name, n.kind, n.what)
}

// remove removes a name, and all below a directory.
func (t *Tree[F]) remove(e Entry) {
	n := t.node(e)
	if n.kind == Gone {
		return
	}
	t.last.known = false
	if n.kind == Dir {
		for c := t.dirs.at(n.what).first; c != 0; c = t.nodes.at(c).next {
			t.remove(Entry(c))
		}
	} else {
		number := t.number(e)
		if names := t.links[number]; names > 1 {
			t.links[number] = names - 1
		} else if t.opts.Removed != nil {
			t.opts.Removed(e, t.files.at(number))
		}
	}
	n.kind, n.layer = Gone, t.layer
}

// touch records that a directory, and so those above it, are in this layer too.
func (t *Tree[F]) touch(dir uint32) {
	for d := t.dirs.at(dir); d.touched != t.layer; d = t.dirs.at(t.node(d.self).parent) {
		d.touched = t.layer
	}
}

// hide removes from dir what lower layers put there, and leaves what this layer put there.
func (t *Tree[F]) hide(dir uint32) {
	d := t.dirs.at(dir)
	if d.hidden == t.layer {
		return
	}
	d.hidden = t.layer
	for e := d.first; e != 0; e = t.nodes.at(e).next {
		t.whiteout(Entry(e))
	}
}

// whiteout removes a name as far as it is of lower layers.
func (t *Tree[F]) whiteout(e Entry) {
	n := t.node(e)
	switch {
	case n.kind == Gone:
	case n.kind == Dir && t.dirs.at(n.what).touched == t.layer:
		t.hide(n.what)
	case n.layer == t.layer:
	default:
		t.remove(e)
		if t.opts.Deleted != nil {
			t.opts.Deleted(e)
		}
	}
}

var errMissing = errors.New("no such file")

// lookup returns the directory that a cleaned path leads to. What is missing on the way is created, unless it must exist.
func (t *Tree[F]) lookup(p string, mustExist bool) (uint32, error) {
	if t.last.known && t.last.path == p {
		return t.last.dir, nil
	}
	e, err := t.resolve(p, true, func(dirs int) error {
		if t.linked -= dirs; t.linked < 0 {
			return refused("symbolic links lead through too many directories: more than %d and %d for each entry", linkedDirs, linkedDirsPerEntry)
		}
		return nil
	}, func(dir uint32, name string) (Entry, error) {
		if mustExist {
			return 0, errMissing
		}
		t.made++
		return t.create(dir, name, Dir, "")
	})
	if err != nil {
		return 0, err
	}
	if t.Kind(e) != Dir {
		return 0, refused("%.200q is not a directory", t.Name(e))
	}
	t.last.path, t.last.dir, t.last.known = p, t.node(e).what, true
	return t.last.dir, nil
}

// Lookup returns the name that a path leads to. Symbolic links on the way are followed, and so is the last one if follow is true.
// NotFound: there is no such file. InvalidArgument: a file on the way is no directory, or there are too many symbolic links.
func (t *Tree[F]) Lookup(p string, follow bool) (Entry, error) {
	return t.resolve(p, follow, func(int) error { return nil }, func(uint32, string) (Entry, error) {
		return 0, errclass.As(errMissing, errdefs.ErrNotFound)
	})
}

// resolve returns what a path leads to. Symbolic links are followed as if the root were that of the file system: links is called with
// the number of directories that one leads through, and missing with what is not there.
func (t *Tree[F]) resolve(p string, follow bool, links func(dirs int) error, missing func(dir uint32, name string) (Entry, error)) (Entry, error) {
	at, hops := Root, 0
	for todo := p; todo != ""; {
		var name string
		if name, todo, _ = strings.Cut(todo, "/"); name == "" || name == "." {
			continue
		}
		if t.Kind(at) != Dir {
			return 0, refused("%.200q is not a directory", t.Name(at))
		}
		if name == ".." {
			at = t.Parent(at)
			continue
		}
		dir := t.node(at).what
		e := t.find(dir, name)
		switch kind := t.Kind(e); {
		case e == Root, kind == Gone, kind == Whiteout:
			var err error
			if e, err = missing(dir, name); err != nil {
				return 0, err
			}
		case kind == Symlink && (follow || todo != ""):
			target := t.Target(e)
			if hops++; hops > maxHops {
				return 0, refused("more than %d symbolic links in a path", maxHops)
			}
			if err := links(1 + strings.Count(target, "/")); err != nil {
				return 0, err
			}
			if todo = target + "/" + todo; len(todo) > 2*layer.MaxPath {
				return 0, refused("symbolic links lead to a path of %d bytes", len(todo))
			}
			if target[0] == '/' {
				at = Root
			}
			continue
		}
		at = e
	}
	return at, nil
}

func refused(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}
