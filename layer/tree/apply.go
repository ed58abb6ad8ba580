package tree

import (
	"archive/tar"
	"errors"
	"strings"

	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
)

// An Action is the effect of an entry on the tree.
type Action uint8

// Actions of entries.
const (
	Ignored Action = iota // an entry of aufs's own, or one that names the root directory and is no directory
	Made                  // a new file, which may replace another
	Merged                // an existing directory, which now has the attributes of the entry
	Linked                // a new name of an existing file
	Deleted               // a whiteout, or the marker of an opaque directory
	Dropped               // a character device 0:0, which overlayfs would read as a whiteout: the file of that name is removed
)

// A Change is what an entry did to the tree.
type Change struct {
	Action Action
	Entry  Entry // set for Made, Merged and Linked
	Lower  bool  // a lower layer had a file of this name
}

// Apply applies an entry of the current layer: see NextLayer. InvalidArgument: no layer may have such an entry.
// FailedPrecondition: the tree takes too much memory. NotImplemented: overlayfs has no form for such a whiteout.
func (t *Tree[F]) Apply(h *tar.Header) (Change, error) {
	t.entries++
	t.linked += linkedDirsPerEntry
	if len(h.Name) > layer.MaxPath {
		return Change{}, refused("name of %d bytes", len(h.Name))
	}
	name := layer.Clean(h.Name)
	if strings.HasPrefix(name, layer.MetaPrefix) && name != layer.OpaqueMarker {
		return Change{}, nil // metadata of aufs, at the top of a layer
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return Change{}, nil
		}
		t.touch(0)
		return t.merged(Root), nil
	}
	parent, base := layer.Split(name)
	if strings.HasPrefix(base, layer.WhiteoutPrefix) {
		return Change{Action: Deleted}, t.applyWhiteout(parent, strings.TrimPrefix(base, layer.WhiteoutPrefix))
	}
	if h.Typeflag == tar.TypeLink {
		return t.applyLink(h, parent, base)
	}
	kind, err := kindOf(h)
	if err != nil {
		return Change{}, err
	}
	dir, err := t.lookup(parent, false)
	if err != nil {
		return Change{}, err
	}
	if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
		return Change{Action: Dropped}, t.drop(dir, base)
	}
	e := t.find(dir, base)
	if kind == Dir && e != Root && t.Kind(e) == Dir {
		t.touch(t.node(e).what())
		return t.merged(e), nil
	}
	lower := t.lower(e)
	e, err = t.create(dir, base, kind, h.Linkname)
	return Change{Made, e, lower}, err
}

// merged records that the current layer sets a directory's attributes.
func (t *Tree[F]) merged(e Entry) Change {
	n := t.node(e)
	c := Change{Merged, e, n.layer() > 0 && n.layer() < t.layer}
	n.set(n.kind(), n.what(), t.layer)
	return c
}

// lower reports whether a lower layer has a file of this name, or had one until the current layer removed it.
func (t *Tree[F]) lower(e Entry) bool {
	if e == Root { // find has found no entry
		return false
	}
	n := t.node(e)
	return n.kind() == Gone && n.layer() == t.layer || n.kind() != Gone && n.layer() < t.layer
}

func kindOf(h *tar.Header) (Kind, error) {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return Regular, nil
	case tar.TypeDir:
		return Dir, nil
	case tar.TypeSymlink:
		if n := len(h.Linkname); n == 0 || n > layer.MaxPath {
			return 0, refused("symbolic link to a name of %d bytes", n)
		}
		return Symlink, nil
	case tar.TypeChar, tar.TypeBlock:
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return 0, refused("device number %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		if h.Typeflag == tar.TypeChar {
			return Char, nil
		}
		return Block, nil
	case tar.TypeFifo:
		return FIFO, nil
	}
	return 0, refused("type %q is not supported", h.Typeflag)
}

func (t *Tree[F]) applyLink(h *tar.Header, parent, base string) (Change, error) {
	target, err := layer.LinkTarget(h)
	if err != nil {
		return Change{}, err
	}
	targetDir, targetBase := layer.Split(target)
	from, err := t.lookup(targetDir, true)
	if err != nil {
		return Change{}, refused("hard link to %.200q: %w", h.Linkname, err)
	}
	dir, err := t.lookup(parent, false)
	if err != nil {
		return Change{}, err
	}
	if from == dir && targetBase == base {
		return Change{}, refused("hard link to itself")
	}
	to := t.find(from, targetBase)
	if to == Root || t.Kind(to) == Gone || t.Kind(to) == Whiteout {
		return Change{}, refused("hard link to %.200q: %w", h.Linkname, errMissing)
	}
	if t.Kind(to) == Dir {
		return Change{}, refused("hard link to the directory %.200q", h.Linkname)
	}
	replaced := t.find(dir, base)
	for above := t.dirs.at(from).self; above != Root; above = t.Parent(above) {
		if above == replaced {
			return Change{}, refused("hard link to %.200q, which it would replace", h.Linkname)
		}
	}
	lower := t.lower(replaced)
	e, err := t.link(dir, base, to)
	return Change{Linked, e, lower}, err
}

// applyWhiteout applies a whiteout in the directory parent. name is the rest after the prefix.
func (t *Tree[F]) applyWhiteout(parent, name string) error {
	if name == "" || name == "." || name == ".." {
		return refused("whiteout of %q", name)
	}
	dir, err := t.lookup(parent, false)
	if err != nil {
		return err
	}
	t.touch(dir)
	whiteouts := t.opts.Whiteouts
	opaque, meta := layer.WhiteoutPrefix+name == layer.OpaqueMarker, strings.HasPrefix(name, layer.WhiteoutPrefix)
	switch {
	case opaque && !whiteouts:
		t.hide(dir)
	case opaque && dir == 0:
		return errclass.As(errors.New("overlayfs can't hide all lower layers: leave whiteouts out"), errdefs.ErrNotImplemented)
	case opaque:
		t.makeOpaque(dir)
	case meta: // metadata of aufs
	case !whiteouts:
		if e := t.find(dir, name); e != Root && t.dirs.at(dir).hidden != t.layer {
			t.whiteout(e)
		}
	case t.isOpaque(dir): // a whiteout would have no effect, and would show in listings
	default:
		e := t.find(dir, name)
		if e == Root || t.Kind(e) == Gone {
			_, err = t.create(dir, name, Whiteout, "")
			return err
		}
		// The current layer has a file of this name, which hides the lower one. Only a directory would be merged with
		// it.
		if t.Kind(e) == Dir {
			t.makeOpaque(t.node(e).what())
		}
	}
	return nil
}

// drop applies a device 0:0: it removes the file of that name.
func (t *Tree[F]) drop(dir uint32, name string) error {
	if e := t.find(dir, name); e != Root {
		t.remove(e)
	}
	if !t.opts.Whiteouts || t.isOpaque(dir) {
		return nil
	}
	_, err := t.create(dir, name, Whiteout, "")
	return err
}

// makeOpaque marks a directory as opaque, in overlay form. The whiteouts below it are removed, because overlayfs shows
// whiteouts in a directory that it does not merge.
func (t *Tree[F]) makeOpaque(dir uint32) {
	if !t.isOpaque(dir) {
		t.dirs.at(dir).opaque = true
		t.removeWhiteouts(dir)
	}
}

func (t *Tree[F]) isOpaque(dir uint32) bool {
	for ; dir != 0; dir = t.node(t.dirs.at(dir).self).parent() {
		if t.dirs.at(dir).opaque {
			return true
		}
	}
	return false
}

// removeWhiteouts removes the whiteouts below a directory. Opaque directories have none, so they are skipped.
func (t *Tree[F]) removeWhiteouts(dir uint32) {
	for c := t.dirs.at(dir).first; c != 0; c = t.nodes.at(c).next() {
		switch n := t.nodes.at(c); {
		case n.kind() == Whiteout:
			t.remove(Entry(c))
		case n.kind() == Dir && !t.dirs.at(n.what()).opaque:
			t.removeWhiteouts(n.what())
		}
	}
}
