package erofs

import (
	"errors"
	"strings"

	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
)

const opaqueAttribute = "trusted.overlay.opaque"

// whiteout applies the whiteout of a name: in a directory, or of all that is in it.
func (a *adder) whiteout(parent, name string) error {
	if name == "" || name == "." || name == ".." {
		return refused("whiteout of %q", name)
	}
	t := a.tree
	dir, err := t.lookup(parent, false)
	if err != nil {
		return err
	}
	t.touch(dir)
	opaque, meta := layer.WhiteoutPrefix+name == layer.OpaqueMarker, strings.HasPrefix(name, layer.WhiteoutPrefix)
	switch {
	case opaque && !t.overlay:
		t.hide(dir)
	case opaque && dir == t.root:
		return errclass.As(errors.New("overlayfs can't hide all lower layers: leave whiteouts out"), errdefs.ErrNotImplemented)
	case opaque:
		t.makeOpaque(dir)
	case meta: // of aufs's own, which no layer has
	case !t.overlay:
		if e := t.entries[key{dir, name}]; e != nil && dir.dir.hidden != t.layer {
			t.whiteout(dir, e)
		}
	case t.isOpaque(dir): // a device would be of no use, and seen in a listing
	default:
		n := t.find(dir, name)
		if n == nil {
			_, err = t.create(dir, name, typeChar)
			return err
		}
		// This layer has the name itself, so hides it unless both are directories.
		if n.isDir() {
			t.makeOpaque(n)
		}
	}
	return nil
}

// whiteoutDevice handles a character device 0:0, which overlayfs would read as a whiteout: it is not created, and what was there is
// removed.
func (a *adder) whiteoutDevice(dir *inode, name string) error {
	a.unset["devices"]++
	if e := a.tree.entries[key{dir, name}]; e != nil && e.inode != nil {
		a.tree.remove(dir, e)
	}
	if !a.tree.overlay || a.tree.isOpaque(dir) {
		return nil
	}
	_, err := a.tree.create(dir, name, typeChar)
	return err
}

func (n *inode) isWhiteout() bool { return n.mode&typeMask == typeChar && n.number == 0 }

// makeOpaque hides in overlay form all that lower layers have in dir. Whiteouts below it are removed: overlayfs lists those of a
// directory that it need not merge.
func (t *tree) makeOpaque(dir *inode) {
	if !t.isOpaque(dir) {
		dir.dir.opaque = true
		t.removeWhiteouts(dir)
	}
}

func (t *tree) isOpaque(dir *inode) bool {
	for ; dir != t.root; dir = dir.dir.parent {
		if dir.dir.opaque {
			return true
		}
	}
	return false
}

// removeWhiteouts removes the whiteouts below a directory. An opaque directory has none.
func (t *tree) removeWhiteouts(dir *inode) {
	for e := dir.dir.first; e != nil; e = e.next {
		switch n := e.inode; {
		case n == nil:
		case n.isWhiteout():
			t.remove(dir, e)
		case n.isDir() && !n.dir.opaque:
			t.removeWhiteouts(n)
		}
	}
}
