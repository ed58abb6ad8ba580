package archive

import (
	"errors"
	"fmt"
	"strings"

	"distkit/disk/sys"
	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// whiteoutDevice handles an entry for a character device 0:0. overlayfs would read the device as a whiteout, so it is
// not created; what is at its place is removed.
func (a *applier) whiteoutDevice(d *dir, base string) error {
	if err := a.tolerate("devices", "create device", unix.EPERM); err != nil {
		return err
	}
	if err := a.tree.remove(d, base); err != nil || a.tree.opaque == "" || a.tree.isOpaque(d.path) {
		return err
	}
	if err := sys.Mknodat(d.fd, base, unix.S_IFCHR, 0); err != nil {
		return fmt.Errorf("create whiteout: %w", err)
	}
	a.tree.wrote(d, base)
	a.tree.record(recordWhiteout, join(d.path, base), "")
	return nil
}

func (a *applier) whiteout(parent, base string) error {
	t := a.tree
	name := strings.TrimPrefix(base, layer.WhiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return invalid("whiteout of %q", name)
	}
	a.result.Whiteouts++
	d, err := t.lookup(parent)
	if err != nil {
		return err
	}
	t.touch(d)
	switch {
	case base == layer.OpaqueMarker && t.opaque == "":
		return t.hide(d)
	case base == layer.OpaqueMarker && d == t.root && t.report != nil:
		t.reapply("", "all lower layers are hidden")
		return nil
	case base == layer.OpaqueMarker && d == t.root:
		return errclass.As(errors.New("overlayfs can't hide all lower layers: apply the layer without an overlay form of whiteouts"), errdefs.ErrNotImplemented)
	case base == layer.OpaqueMarker:
		return t.makeOpaque(d)
	case strings.HasPrefix(base, layer.MetaPrefix):
		return nil // metadata of aufs
	case t.opaque == "":
		return t.whiteout(d, name)
	}
	if t.isOpaque(d.path) {
		return nil // a whiteout would have no effect, and show in listings
	}
	err = sys.Mknodat(d.fd, name, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return fmt.Errorf("create whiteout: %w", err)
		}
		t.record(recordWhiteout, join(d.path, name), "")
		return nil
	}
	// This layer has the name too, which hides that of lower layers unless both are directories.
	var st unix.Stat_t
	if err := sys.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	c, _, err := t.child(d, name)
	if err != nil {
		return err
	}
	return t.makeOpaque(c)
}

// hide removes the content of d that lower layers put there, and keeps what this layer wrote.
func (t *tree) hide(d *dir) error {
	if d.ours {
		return nil
	}
	p, h := d.path, d.hash
	var both []string // directories of lower layers in which this layer wrote; only these are kept in memory
	if err := sys.EachName(d.fd, func(name string) error {
		if has(t.touched, t.under(h, name)) && !has(t.created, t.under(h, name)) {
			both = append(both, name)
			return nil
		}
		return t.whiteout(d, name)
	}); err != nil {
		return err
	}
	for _, name := range both {
		c, err := t.lookup(join(p, name))
		if err != nil {
			return err
		}
		if err := t.hide(c); err != nil {
			return err
		}
	}
	// The rest is this layer's, so the next opaque marker has nothing to do.
	t.created[h] = struct{}{}
	if open, ok := t.open[h]; ok { // a nested call may have closed d and opened it again
		d = open
	}
	d.ours = true
	return nil
}

// whiteout removes name from d as far as it belongs to lower layers.
func (t *tree) whiteout(d *dir, name string) error {
	if d.ours {
		return nil
	}
	h := t.under(d.hash, name)
	switch {
	case has(t.created, h):
		return nil
	case has(t.touched, h):
		c, err := t.lookup(join(d.path, name))
		if err != nil {
			return err
		}
		return t.hide(c)
	}
	return t.remove(d, name)
}

// makeOpaque makes d opaque in overlay form. It removes whiteouts below d, because overlayfs shows them in a directory
// that it doesn't merge.
func (t *tree) makeOpaque(d *dir) error {
	if t.isOpaque(d.path) {
		return nil
	}
	if err := t.setOpaque(d.fd, d.hash); err != nil {
		return err
	}
	return t.removeWhiteouts(d.fd, d.hash)
}

func (t *tree) setOpaque(fd int, hash uint64) error {
	if err := sys.Fsetxattr(fd, t.opaque, []byte("y"), 0); err != nil {
		return fmt.Errorf("set %s: %w", t.opaque, err)
	}
	t.opaques[hash] = struct{}{}
	return nil
}

func (t *tree) isOpaque(p string) bool { return t.anyAbove(t.opaques, p) }

// removeWhiteouts removes the whiteouts below an open directory with hash h. It skips opaque directories, which have
// none, so each directory is searched once.
func (t *tree) removeWhiteouts(fd int, h uint64) error {
	trail, err := sys.NewTrail(fd, ".")
	defer func() { trail.Close() }()
	if err != nil {
		return err
	}
	hashes := []uint64{h} // of the directories in trail
	for len(trail) > 0 {
		name, err := trail.Next()
		if err != nil {
			return err
		}
		if name == "" {
			if err := trail.Up(); err != nil {
				return err
			}
			hashes = hashes[:len(trail)]
			continue
		}
		var st unix.Stat_t
		if err := sys.Fstatat(trail.FD(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		hash := t.under(hashes[len(hashes)-1], name)
		switch {
		case isWhiteout(&st):
			err = sys.Unlinkat(trail.FD(), name, 0)
		case has(t.opaques, hash):
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			hashes = append(hashes, hash)
			err = trail.Down(name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}
