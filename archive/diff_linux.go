package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"hash/maphash"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"distkit/disk/sys"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// DiffOptions change what Diff does. The zero value is the usual.
type DiffOptions struct {
	Compression Compression
	// Overlay tells that upper is an upper directory of overlayfs. It alone is read, and its
	// marks of deletion, attributes of trusted.overlay or user.overlay among them, become those
	// of a layer.
	Overlay bool
	// Latest, if not zero, is the time that entries with a later one get.
	Latest time.Time
	// UIDs and GIDs map the owners of the layer to those of the files.
	UIDs, GIDs IDMap
	// Only, if not empty, leaves out all entries but those of these paths, below them, and on the way to them; Exclude leaves
	// out those of its paths and below them. What is left out is not read, and the layer does not remove it: where upper has no directory
	// above it any more, that of lower stays as it is.
	Only, Exclude []string
	// Archive makes an archive of upper for tar(1), which is not a layer: names that are marks of deletion are names like any other,
	// and what is mounted below upper is left out. Upper itself has no entry. It may change meanwhile: what vanishes is left out,
	// and a file that grows is written as it was when it was opened.
	Archive bool
	// Workers is the number of goroutines that compress, by default as many as there are
	// processors, up to four. The layer's bytes do not depend on it.
	Workers int
}

// Diff writes to w the layer that makes of the directory lower the directory upper, or, if lower
// is "", that makes upper of nothing. Applied to lower it gives upper in every type, mode, owner,
// size, content, modification time to the nanosecond, extended attribute, link target, device
// number and set of hard links. The same trees give the same bytes.
//
// Entries are in the order of their names' bytes, a directory before what it holds. With a
// changed file stand the directories above it, the top only when it is itself changed. Files
// whose attributes are equal are compared by content, unless they are known to be the same file. The names
// of a file with several stand together: if their set changed, or the file did, the layer holds
// the file once and links to it. Sockets are taken for missing, and attributes that belong to a
// host (security.selinux, security.ima, security.evm, system.nfs4_acl, those of overlayfs) are
// neither compared nor written.
//
// What no layer can say is ErrNotImplemented: names that are marks of deletion, paths longer
// than 4095 bytes, metacopy and redirect attributes of overlayfs. Its whiteouts and opaque
// directories are ErrInvalidArgument without Overlay. The directories must not change meanwhile.
// Diff returns after ctx is done as soon as a write to w that is under way has returned.
func Diff(ctx context.Context, w io.Writer, lower, upper string, opts DiffOptions) (Layer, error) {
	if opts.Overlay && lower != "" {
		return Layer{}, refused("an overlay upper directory is compared with nothing")
	}
	if opts.Workers <= 0 {
		opts.Workers = min(4, runtime.GOMAXPROCS(0))
	}
	d := &differ{
		ctx: ctx, opts: opts, selected: newSelection(opts.Only, opts.Exclude),
		chowns: sys.Capable(unix.CAP_CHOWN),
		seed:   maphash.MakeSeed(), links: map[inode]string{}, clean: map[uint64]struct{}{},
		lowerLinks: map[inode]nameSet{}, upperLinks: map[inode]nameSet{},
		buffers: [2][]byte{make([]byte, compareSize), make([]byte, compareSize)},
	}
	up, err := openTop(upper)
	if err != nil {
		return Layer{}, err
	}
	defer up.close()
	var lo *node
	if lower != "" {
		if lo, err = openTop(lower); err != nil {
			return Layer{}, err
		}
		defer lo.close()
		d.know(lo, up)
		if _, err := d.survey("", lo.fd, up.fd); err != nil {
			return Layer{}, err
		}
	}
	c, err := newCompressor(ctx, w, opts.Compression, opts.Workers)
	if err != nil {
		return Layer{}, err
	}
	d.tar = tar.NewWriter(c)
	if err = d.top(lo, up); err == nil {
		err = d.tar.Close()
	}
	if err != nil {
		c.abandon()
		return Layer{}, err
	}
	return c.finish()
}

const compareSize = 128 << 10

// A differ walks two trees side by side. Nothing is opened but single names below directories
// that are held open, and no symbolic link is followed.
type differ struct {
	ctx      context.Context
	opts     DiffOptions
	selected selection
	tar      *tar.Writer
	buffers  [2][]byte
	knows    bool                // some files can be known as unchanged
	clean    map[uint64]struct{} // directories below which nothing differs, by the hash of the path
	tops     [2]top
	parted   time.Time // of two btrfs snapshots: before it they were the same
	chowns   bool      // CAP_CHOWN: files have the owners that they were to get

	// Of files with several names, which names those are in each tree, as far as both trees
	// have the name: what one tree lacks is removed or written anyway.
	seed                   maphash.Seed
	lowerLinks, upperLinks map[inode]nameSet

	links map[inode]string // names that the layer holds of files with several
}

// A nameSet stands for a set of paths: two that differ have the same sum only by a chance of
// one in 2^64, which nobody who does not know the seed can bring about.
type nameSet struct {
	n   int
	sum uint64
}

// each calls f for the names that two directories hold, in order, with what each has; a
// descriptor of -1 is a directory that is not there.
func (d *differ) each(dir string, lower, upper int, f func(lo, up *node) error) error {
	lows, err := sortedNames(lower, dir)
	if err != nil {
		return err
	}
	ups, err := sortedNames(upper, dir)
	if err != nil {
		return err
	}
	left := func(name string) bool { return !d.selected.has(join(dir, name), true) }
	lows, ups = slices.DeleteFunc(lows, left), slices.DeleteFunc(ups, left)
	for len(lows) > 0 || len(ups) > 0 {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		order := 0
		switch {
		case len(lows) == 0:
			order = 1
		case len(ups) == 0:
			order = -1
		default:
			order = strings.Compare(lows[0], ups[0])
		}
		var lo, up *node
		if order <= 0 {
			if lo, err = stat(lower, dir, lows[0]); err != nil {
				return err
			}
			lows = lows[1:]
		}
		if order >= 0 {
			if up, err = stat(upper, dir, ups[0]); err != nil {
				return err
			}
			ups = ups[1:]
		}
		if lo == nil && up == nil {
			continue
		}
		if err := f(lo, up); err != nil {
			return err
		}
	}
	return nil
}

// survey records the names of files with several that both trees have, and the directories of which it is known that nothing below
// them differs: clean reports that of this one.
func (d *differ) survey(dir string, lower, upper int) (clean bool, err error) {
	clean = d.knows && lower >= 0
	err = d.each(dir, lower, upper, func(lo, up *node) error {
		switch {
		case up == nil:
			clean = false
			return nil
		case up.isDir() && (lo == nil || !lo.isDir()):
			lo = nil
		case !up.isDir():
			d.note(d.upperLinks, up)
			if lo != nil && !lo.isDir() {
				d.note(d.lowerLinks, lo)
			}
			clean = clean && lo != nil && up.st.Nlink == 1 && lo.st.Nlink == 1 && !isWhiteout(&up.st) && d.unchanged(lo, up)
			return nil
		}
		if err := up.open(); err != nil {
			return err
		}
		defer up.close()
		fd := -1
		if lo != nil {
			if err := lo.open(); err != nil {
				return err
			}
			defer lo.close()
			fd = lo.fd
		}
		below, err := d.survey(up.path, fd, up.fd)
		if below && err == nil {
			d.clean[maphash.String(d.seed, up.path)] = struct{}{}
			below, err = d.same(lo, up)
		}
		clean = clean && below
		return err
	})
	return clean, err
}

func (d *differ) note(links map[inode]nameSet, n *node) {
	if n.st.Nlink > 1 {
		s := links[n.inode()]
		links[n.inode()] = nameSet{s.n + 1, s.sum + maphash.String(d.seed, n.path)}
	}
}

func (d *differ) namesOf(links map[inode]nameSet, n *node) nameSet {
	if n.st.Nlink > 1 {
		return links[n.inode()]
	}
	return nameSet{1, maphash.String(d.seed, n.path)}
}

func (d *differ) top(lo, up *node) error {
	if lo != nil {
		same, err := d.same(lo, up)
		if err != nil {
			return err
		}
		up.written = same
	}
	up.written = up.written || d.opts.Archive
	if err := d.writeParents(up); err != nil {
		return err
	}
	up.written = true
	return d.directory(lo, up)
}

// directory writes what differs below upper, whose lower may be nil.
func (d *differ) directory(lo, up *node) error {
	lower := -1
	if lo != nil {
		lower = lo.fd
	}
	if err := d.overlayDir(up); err != nil {
		return err
	}
	if lo != nil && has(d.clean, maphash.String(d.seed, up.path)) {
		return nil
	}
	return d.each(up.path, lower, up.fd, func(lo, up2 *node) error {
		if up2 == nil {
			return d.whiteout(up, lo.name, lo)
		}
		up2.parentNode = up
		return d.entry(lo, up2)
	})
}

// entry writes a file that upper has, as far as it differs from lower's, which may be nil.
func (d *differ) entry(lo, up *node) error {
	if isWhiteout(&up.st) && !d.opts.Archive {
		if !d.opts.Overlay {
			return up.notUpper("is a whiteout of overlayfs")
		}
		return d.whiteout(up.parentNode, up.name, nil)
	}
	same := false
	if lo != nil {
		var err error
		if same, err = d.same(lo, up); err != nil {
			return err
		}
	}
	if up.isDir() {
		up.named = d.isNamed(up)
		err := up.open()
		switch {
		case d.opts.Archive && vanished(err):
			return nil
		case d.opts.Archive && errdefs.IsFailedPrecondition(err):
			return d.write(up)
		case err != nil:
			return err
		}
		defer up.close()
		if !same {
			if err := d.writeParents(up); err != nil {
				return err
			}
		}
		if lo != nil && lo.isDir() {
			if err := lo.open(); err != nil {
				return err
			}
			defer lo.close()
		} else {
			lo = nil
		}
		return d.directory(lo, up)
	}
	if same || d.hidesUnselected(up.path, lo) {
		return nil
	}
	return d.write(up)
}

// isNamed reports whether a file is one that Only has in an Archive.
func (d *differ) isNamed(n *node) bool {
	return d.opts.Archive && n.parentNode != nil && n.parentNode.path == "" && slices.Contains(d.opts.Only, n.path)
}

// same tells whether lower's file needs no entry to be upper's. Of directories it compares
// themselves alone.
func (d *differ) same(lo, up *node) (bool, error) {
	if !up.isDir() && d.namesOf(d.lowerLinks, lo) != d.namesOf(d.upperLinks, up) {
		return false, nil
	}
	if lo.inode() == up.inode() || d.unchanged(lo, up) {
		return true, nil
	}
	a, b := &lo.st, &up.st
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Mtim != b.Mtim {
		return false, nil
	}
	switch up.kind() {
	case unix.S_IFREG, unix.S_IFLNK:
		if a.Size != b.Size {
			return false, nil
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Rdev != b.Rdev {
			return false, nil
		}
	}
	for _, n := range []*node{lo, up} {
		if err := d.readXattrs(n); err != nil {
			return false, err
		}
	}
	if !slices.EqualFunc(lo.xattrs, up.xattrs, func(a, b layer.Xattr) bool { return a.Name == b.Name && bytes.Equal(a.Value, b.Value) }) {
		return false, nil
	}
	switch up.kind() {
	case unix.S_IFLNK:
		at, err := lo.readlink()
		if err != nil {
			return false, err
		}
		bt, err := up.readlink()
		return at == bt, err
	case unix.S_IFREG:
		return d.sameContent(lo, up)
	}
	return true, nil
}

func (d *differ) sameContent(lo, up *node) (bool, error) {
	if up.st.Size == 0 {
		return true, nil
	}
	a, err := lo.openFile()
	if err != nil {
		return false, err
	}
	defer unix.Close(a)
	b, err := up.openFile()
	if err != nil {
		return false, err
	}
	defer unix.Close(b)
	for left := up.st.Size; left > 0; {
		if err := d.ctx.Err(); err != nil {
			return false, err
		}
		n := min(left, compareSize)
		pa, pb := d.buffers[0][:n], d.buffers[1][:n]
		if err := lo.readFull(a, pa); err != nil {
			return false, err
		}
		if err := up.readFull(b, pb); err != nil {
			return false, err
		}
		if !bytes.Equal(pa, pb) {
			return false, nil
		}
		left -= n
	}
	return true, nil
}

// overlayDir writes the mark of an opaque directory.
func (d *differ) overlayDir(up *node) error {
	if err := d.readXattrs(up); err != nil {
		return err
	}
	if string(up.overlay["opaque"]) != "y" || !d.selected.whole(up.path) { // x tells that files in it may be whiteouts
		return nil
	}
	return d.mark(up, layer.OpaqueMarker)
}
