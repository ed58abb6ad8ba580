// Package tree merges layers in memory, as the image specification's "Applying Changesets" says. Whiteouts, opaque
// directories and hard links into lower layers are resolved, and symbolic links are followed as if the image's root
// were the root of the file system.
//
// [New] makes a [Tree] with a root directory only. NextLayer begins a layer and Apply applies one of its entries. The
// user keeps data of type F for each file, and learns by the functions of [Options] what is created and removed. An
// [Entry] is a name in a directory; Children, Lookup and Path go from one to another.
//
// A tree takes about 18 bytes an entry, besides the bytes of its name that differ from the name before it and the F.
// Entries come from strangers, so memory, hops and the length of paths are bounded. Error classes: InvalidArgument for an
// entry that no layer may have, FailedPrecondition for too much memory, NotImplemented for a whiteout that overlayfs can't
// express, NotFound from Lookup.
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
	maxHops = 40 // symbolic links followed in one path: the kernel's limit

	// Symbolic links let a short name lead through many directories. Together, the entries of a layer may lead through
	// linkedDirs directories, and linkedDirsPerEntry more for each entry.
	linkedDirs, linkedDirsPerEntry = 1 << 16, 64

	// Memory in bytes of a name, a directory, a symbolic link and a file with several names, including their share of
	// lists and index.
	nameMemory, dirMemory, symlinkMemory, linksMemory = 20, 24, 48, 48
)

// A Kind is the type of a file: bits 12 to 15 of st_mode.
type Kind uint8

// Kinds of files.
const (
	Gone     Kind = 0 // of a name that was removed
	FIFO     Kind = 1
	Char     Kind = 2
	Dir      Kind = 4
	Block    Kind = 6
	Regular  Kind = 8
	Symlink  Kind = 10
	Whiteout Kind = 15 // hides the lower layers' file of that name; only with Options.Whiteouts
)

// An Entry is a name in a directory.
type Entry uint32

// Root is the root directory, which has no name.
const Root Entry = 0

// Options of a Tree.
type Options[F any] struct {
	// MaxMemory bounds the tree's memory, in bytes. 0 means no bound.
	MaxMemory int64
	// Whiteouts keeps whiteouts and opaque directories as overlayfs represents them. It is for a tree of one layer.
	Whiteouts bool
	// New is called for each new file, also for directories that are created because an entry lies in them.
	New func(Kind, *F)
	// Removed, if not nil, is called before a file's last name is removed or replaced. It is not called for
	// directories.
	Removed func(Entry, *F)
	// Deleted, if not nil, is called for each name that a layer deletes from lower layers, but not for the names below
	// a deleted directory.
	Deleted func(Entry)
}

// A Tree is the file system that results from applied layers. It keeps an F for each file.
type Tree[F any] struct {
	opts    Options[F]
	size    int64 // size of an F
	memory  int64
	layer   uint16 // number of the current layer, from 1 on
	entries int64
	made    int64
	linked  int // how many more directories symbolic links may lead through

	nodes    list[node]
	names    names
	index    index
	files    list[F]
	dirs     list[directory]
	symlinks list[symlink]
	links    map[uint32]uint32 // number of names, of files that have several
	last     struct {          // the result of the last lookup, known until something is removed
		path  string
		dir   uint32
		known bool
	}
}

// A node is an entry. It holds the number of the directory that contains it, the next entry in the same directory (0 for
// none), and, by kind, the number of its directory, symbolic link or file. These have 26 bits each. The low 6 bits hold
// the kind and the layer that put the file here, or removed it. If the name was removed, its kind is Gone, and the node is
// reused when the directory gets that name again.
type node struct{ parentBits, nextBits, whatBits uint32 }

const maxLayer = 1<<15 - 1

var kinds = [8]Kind{Gone, FIFO, Char, Dir, Block, Regular, Symlink, Whiteout}

func newNode(parent, next uint32) node {
	return node{parentBits: parent << spareBits, nextBits: next << spareBits}
}

func (n *node) parent() uint32 { return n.parentBits >> spareBits }
func (n *node) next() uint32   { return n.nextBits >> spareBits }
func (n *node) what() uint32   { return n.whatBits >> spareBits }
func (n *node) kind() Kind     { return kinds[n.whatBits&7] }

func (n *node) layer() uint16 {
	return uint16(n.whatBits&(spare&^7)<<9 | n.nextBits&spare<<6 | n.parentBits&spare)
}

func (n *node) set(kind Kind, what uint32, layer uint16) {
	l := uint32(layer)
	n.whatBits = what<<spareBits | l>>12<<3 | uint32(slices.Index(kinds[:], kind))
	n.nextBits = n.nextBits&^spare | l>>6&spare
	n.parentBits = n.parentBits&^spare | l&spare
}

type directory struct {
	self    Entry
	file    uint32
	first   uint32 // first entry, 0 for none
	path    uint16 // length of its path
	touched uint16 // the last layer that names the directory or changes something in it
	hidden  uint16 // the last layer for which hide has run here
	opaque  bool   // in overlay form
}

type symlink struct {
	target string
	file   uint32
}

// New returns a Tree that has only a root directory.
func New[F any](opts Options[F]) *Tree[F] {
	t := &Tree[F]{opts: opts, size: int64(reflect.TypeFor[F]().Size()), linked: linkedDirs, links: map[uint32]uint32{}}
	t.index.seed = maphash.MakeSeed()
	var root node
	root.set(Dir, 0, 0)
	t.nodes.add(root)
	t.names.add("")
	t.dirs.add(directory{file: t.newFile(Dir)})
	return t
}

// NextLayer begins a layer on top of the previous ones. A tree has at most 32767.
func (t *Tree[F]) NextLayer() {
	if t.layer == maxLayer {
		panic("tree: too many layers")
	}
	t.layer++
}

// Implied returns the number of directories that were created because entries need them and none names them before.
func (t *Tree[F]) Implied() int64 { return t.made }

// Entries returns the number of applied entries, plus that of directories that no entry names.
func (t *Tree[F]) Entries() int64 { return t.entries + t.made }

// Charge counts memory that the user needs for files. It is never given back. FailedPrecondition: the tree would take
// more than Options.MaxMemory.
func (t *Tree[F]) Charge(n int64) error {
	if t.memory += n; t.opts.MaxMemory > 0 && t.memory > t.opts.MaxMemory {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "the image's files take more than %d bytes of memory", t.opts.MaxMemory)
	}
	return nil
}

// Kind returns the kind of the entry's file.
func (t *Tree[F]) Kind(e Entry) Kind { return t.node(e).kind() }

// Layer returns the number of the layer, from 1 on, that put the file there, set the directory's attributes or removed
// the name. For the root directory it is 0 until a layer names it.
func (t *Tree[F]) Layer(e Entry) int { return int(t.node(e).layer()) }

// Name returns the entry's name in its directory.
func (t *Tree[F]) Name(e Entry) []byte { return t.names.append(nil, uint32(e)) }

// Parent returns the directory that holds the entry. The root directory is its own parent.
func (t *Tree[F]) Parent(e Entry) Entry { return t.dirs.at(t.node(e).parent()).self }

// File returns the user's data for the entry's file.
func (t *Tree[F]) File(e Entry) *F { return t.files.at(t.Number(e)) }

// Target returns the target of a symbolic link.
func (t *Tree[F]) Target(e Entry) string { return t.symlinks.at(t.node(e).what()).target }

// Opaque reports whether a directory hides the lower layers' directory, in overlay form.
func (t *Tree[F]) Opaque(e Entry) bool { return t.dirs.at(t.node(e).what()).opaque }

// Links returns the number of names of a file that is not a directory.
func (t *Tree[F]) Links(e Entry) uint32 {
	if n := t.links[t.Number(e)]; n > 1 {
		return n
	}
	return 1
}

// Path returns the entry's path, without a leading slash.
func (t *Tree[F]) Path(e Entry) string {
	var parts [][]byte
	for ; e != Root; e = t.Parent(e) {
		parts = append(parts, t.Name(e))
	}
	slices.Reverse(parts)
	return string(bytes.Join(parts, []byte("/")))
}

// Children appends the entries of a directory to list, sorted by the bytes of their names.
func (t *Tree[F]) Children(e Entry, list []Entry) []Entry {
	from := len(list)
	for c := t.dirs.at(t.node(e).what()).first; c != 0; c = t.nodes.at(c).next() {
		if t.nodes.at(c).kind() != Gone {
			list = append(list, Entry(c))
		}
	}
	slices.Reverse(list[from:]) // layers often have names in this order
	compare := func(a, b Entry) int {
		var x, y [maxName]byte
		return bytes.Compare(t.names.append(x[:0], uint32(a)), t.names.append(y[:0], uint32(b)))
	}
	if !slices.IsSortedFunc(list[from:], compare) {
		slices.SortFunc(list[from:], compare)
	}
	return list
}

func (t *Tree[F]) node(e Entry) *node { return t.nodes.at(uint32(e)) }

// Number returns the number of the entry's file, from 0 on. All names of a file have the same number.
func (t *Tree[F]) Number(e Entry) uint32 {
	n := t.node(e)
	switch n.kind() {
	case Dir:
		return t.dirs.at(n.what()).file
	case Symlink:
		return t.symlinks.at(n.what()).file
	}
	return n.what()
}

func (t *Tree[F]) newFile(kind Kind) uint32 {
	var f F
	if t.opts.New != nil {
		t.opts.New(kind, &f)
	}
	return t.files.add(f)
}

// find returns the entry of a name, which may be Gone, or 0 if there is none.
func (t *Tree[F]) find(dir uint32, name string) Entry {
	return Entry(t.index.find(t.index.hash(dir, []byte(name)), func(e uint32) bool {
		var b [maxName]byte
		return t.nodes.at(e).parent() == dir && string(t.names.append(b[:0], e)) == name
	}))
}

// put puts a file under a name in dir. It replaces the file that has that name.
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
		d.first = t.nodes.add(newNode(dir, d.first))
		e = Entry(d.first)
		t.names.add(name)
		t.index.add(t.index.hash(dir, []byte(name)), uint32(e), func(n uint32) uint64 {
			var b [maxName]byte
			return t.index.hash(t.nodes.at(n).parent(), t.names.append(b[:0], n))
		})
	} else {
		t.remove(e)
	}
	t.node(e).set(kind, what, t.layer)
	t.touch(dir)
	return e, nil
}

// check returns an error if dir can't have an entry of that name on any file system.
func (t *Tree[F]) check(dir uint32, name string) error {
	if len(name) > maxName {
		return refused("path with a name of %d bytes: at most %d are possible", len(name), maxName)
	}
	if n := int(t.dirs.at(dir).path) + 1 + len(name); n > layer.MaxPath {
		return refused("path of %d bytes: at most %d are possible", n, layer.MaxPath)
	}
	return nil
}

// create creates a file under a name in dir. It replaces the file that has that name. In overlay form, a directory that
// replaces a file is opaque: what the file hid of the lower layers must stay hidden.
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
	if t.files.n == maxEntries {
		return 0, errclass.Errorf(errdefs.ErrFailedPrecondition, "more than %d files", maxEntries)
	}
	what := t.newFile(kind)
	switch kind {
	case Symlink:
		what = t.symlinks.add(symlink{strings.Clone(target), what})
	case Dir:
		e := t.find(dir, name)
		what = t.dirs.add(directory{file: what, path: t.dirs.at(dir).path + 1 + uint16(len(name)), touched: t.layer, hidden: t.layer,
			opaque: t.opts.Whiteouts && e != 0 && t.node(e).kind() != Gone})
	}
	e, err := t.put(dir, name, kind, what)
	if err == nil && kind == Dir {
		t.dirs.at(what).self = e
	}
	return e, err
}

// link adds a name to a file.
func (t *Tree[F]) link(dir uint32, name string, to Entry) (Entry, error) {
	if err := t.check(dir, name); err != nil {
		return 0, err
	}
	n, number := *t.node(to), t.Number(to)
	if _, several := t.links[number]; !several {
		if err := t.Charge(linksMemory); err != nil {
			return 0, err
		}
		t.links[number] = 1
	}
	t.links[number]++
	return t.put(dir, name, n.kind(), n.what())
}

// remove removes a name and, of a directory, everything below it.
func (t *Tree[F]) remove(e Entry) {
	n := t.node(e)
	if n.kind() == Gone {
		return
	}
	t.last.known = false
	if n.kind() == Dir {
		for c := t.dirs.at(n.what()).first; c != 0; c = t.nodes.at(c).next() {
			t.remove(Entry(c))
		}
	} else {
		number := t.Number(e)
		if names := t.links[number]; names > 1 {
			t.links[number] = names - 1
		} else if t.opts.Removed != nil {
			t.opts.Removed(e, t.files.at(number))
		}
	}
	n.set(Gone, n.what(), t.layer)
}

// touch records that the current layer changes something in a directory, and so in those above it.
func (t *Tree[F]) touch(dir uint32) {
	for d := t.dirs.at(dir); d.touched != t.layer; d = t.dirs.at(t.node(d.self).parent()) {
		d.touched = t.layer
	}
}

// hide removes what lower layers have put into a directory. What the current layer has put there stays.
func (t *Tree[F]) hide(dir uint32) {
	d := t.dirs.at(dir)
	if d.hidden == t.layer {
		return
	}
	d.hidden = t.layer
	for e := d.first; e != 0; e = t.nodes.at(e).next() {
		t.whiteout(Entry(e))
	}
}

// whiteout removes the parts of a name that lower layers have put there.
func (t *Tree[F]) whiteout(e Entry) {
	n := t.node(e)
	switch {
	case n.kind() == Gone:
	case n.kind() == Dir && t.dirs.at(n.what()).touched == t.layer:
		t.hide(n.what())
	case n.layer() == t.layer:
	default:
		t.remove(e)
		if t.opts.Deleted != nil {
			t.opts.Deleted(e)
		}
	}
}

var errMissing = errors.New("no such file")

// lookup returns the directory at a cleaned path. Missing directories are created, unless mustExist is true.
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
	t.last.path, t.last.dir, t.last.known = p, t.node(e).what(), true
	return t.last.dir, nil
}

// Lookup returns the entry at a path. It follows symbolic links on the way, and the last one if follow is true.
// NotFound: there is no such file. InvalidArgument: a file on the way is not a directory, or there are too many
// symbolic links.
func (t *Tree[F]) Lookup(p string, follow bool) (Entry, error) {
	return t.resolve(p, follow, func(int) error { return nil }, func(uint32, string) (Entry, error) {
		return 0, errclass.As(errMissing, errdefs.ErrNotFound)
	})
}

// resolve returns the entry at a path. It follows symbolic links as if the tree's root were the root of the file
// system. It calls links with the number of directories in the target of each symbolic link, and missing for each name
// that does not exist.
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
		dir := t.node(at).what()
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
