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

// DiffOptions modify what Diff does. The zero value is the usual case.
type DiffOptions struct {
	Compression Compression
	// Overlay says that upper is an upper directory of overlayfs. Diff then reads upper alone, and translates the
	// whiteouts, opaque directories and attributes of overlayfs (trusted.overlay or user.overlay) to those of a layer.
	Overlay bool
	// Latest, if not zero, is the largest modification time of an entry: later times are replaced by it.
	Latest time.Time
	// UIDs and GIDs map the owners in the layer to those of the files.
	UIDs, GIDs IDMap
	// Only, if not empty, selects the entries with these paths, below them, and on the way to them. Exclude leaves out
	// those with its paths and below them. What is left out is not read, and the layer doesn't remove it: if upper has
	// lost a directory above it, that of lower stays.
	Only, Exclude []string
	// Archive makes a plain tar archive of upper instead of a layer: whiteout names are ordinary names, other mounts
	// below upper are left out, and upper itself has no entry. Upper may change while it is read: what vanishes is left
	// out, and a file that grows is written with the size that it had when it was opened.
	Archive bool
	// Workers is the number of goroutines that compress. The default is the number of processors, but at most four. The
	// layer's bytes don't depend on it.
	Workers int
}

// Diff writes to w a layer that turns the directory lower into the directory upper. If lower is "" the layer holds all
// of upper. Applied to lower it reproduces the type, mode, owner, size, content, modification time in nanoseconds,
// extended attributes, link target, device number and hard links of everything in upper. Equal trees give equal bytes.
//
// Entries are ordered by the bytes of their names, a directory before its content. A changed file is preceded by
// entries for its parent directories, but by one for the top only if that has changed. Files with equal attributes are
// compared by content, unless they are known to be the same file. If a file with several hard links changed, or the set
// of its names did, the layer holds the file once and links the other names to it. Sockets are skipped. Attributes that
// belong to the host (security.selinux, security.ima, security.evm, system.nfs4_acl and those of overlayfs) are neither
// compared nor written.
//
// ErrNotImplemented: something that a layer can't express, such as names that mean whiteouts, paths of more than 4095
// bytes, or overlayfs's attributes metacopy and redirect. ErrInvalidArgument: whiteouts or opaque directories of
// overlayfs, unless Overlay is set. The directories must not change while Diff reads them. When ctx is done Diff
// returns as soon as the current Write to w returns.
func Diff(ctx context.Context, w io.Writer, lower, upper string, opts DiffOptions) (Layer, error) {
	if opts.Overlay && lower != "" {
		return Layer{}, invalid("an overlay upper directory has no lower directory to compare it with")
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
		d.findIdentity(lo, up)
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

// A differ walks two trees side by side. It opens single names in directories that it holds open, and follows no
// symbolic link.
type differ struct {
	ctx      context.Context
	opts     DiffOptions
	selected selection
	tar      *tar.Writer
	buffers  [2][]byte
	identity bool                // some files can be known to be unchanged without reading them: see unchanged
	clean    map[uint64]struct{} // directories, by the hash of their paths, below which nothing differs
	tops     [2]top
	diverged time.Time // for two btrfs snapshots, a time before which they were equal
	chowns   bool      // CAP_CHOWN: files have the owners that the layer gave them

	// For files with several names, the set of these names in each tree. Only names that exist in both trees count: a
	// name that one tree lacks is written or removed anyway.
	seed                   maphash.Seed
	lowerLinks, upperLinks map[inode]nameSet

	links map[inode]string // for files with several names, the first name in the layer
}

// A nameSet represents a set of paths. Different sets have equal sums with a probability of 2^-64, which nobody can
// increase without knowing the seed.
type nameSet struct {
	n   int
	sum uint64
}

// each calls f for each name in either of two directories, in order. lo or up is nil if a directory lacks the name. A
// descriptor of -1 stands for a missing directory.
func (d *differ) each(dir string, lower, upper int, f func(lo, up *node) error) error {
	lows, err := sortedNames(lower, dir)
	if err != nil {
		return err
	}
	ups, err := sortedNames(upper, dir)
	if err != nil {
		return err
	}
	excluded := func(name string) bool { return !d.selected.has(join(dir, name), true) }
	lows, ups = slices.DeleteFunc(lows, excluded), slices.DeleteFunc(ups, excluded)
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

// survey records the names of files with several names, and the directories below which nothing differs. clean reports
// whether this is so for the given directory.
func (d *differ) survey(dir string, lower, upper int) (clean bool, err error) {
	clean = d.identity && lower >= 0
	err = d.each(dir, lower, upper, func(lo, up *node) error {
		switch {
		case up == nil:
			clean = false
			return nil
		case up.isDir() && (lo == nil || !lo.isDir()):
			lo = nil
		case !up.isDir():
			d.addName(d.upperLinks, up)
			if lo != nil && !lo.isDir() {
				d.addName(d.lowerLinks, lo)
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

func (d *differ) addName(links map[inode]nameSet, n *node) {
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

// directory writes what differs below the directory up. lo is the directory in lower, or nil.
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

// entry writes a file of upper, as far as it differs from that of lower. lo is nil if lower lacks it.
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

// isNamed reports whether a file at the top is listed in Only, in an Archive.
func (d *differ) isNamed(n *node) bool {
	return d.opts.Archive && n.parentNode != nil && n.parentNode.path == "" && slices.Contains(d.opts.Only, n.path)
}

// same reports whether a file in upper equals that in lower, so that it needs no entry. It compares only the
// directories themselves, not their content.
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

// overlayDir writes an opaque marker if the directory is opaque in overlayfs.
func (d *differ) overlayDir(up *node) error {
	if err := d.readXattrs(up); err != nil {
		return err
	}
	if string(up.overlay["opaque"]) != "y" || !d.selected.whole(up.path) { // "x" would mean that files in the directory may be whiteouts
		return nil
	}
	return d.mark(up, layer.OpaqueMarker)
}
