package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"distkit/disk/sys"
	"distkit/errclass"

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
// whose attributes are equal are compared by content, unless they are the same file. The names
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
		ctx: ctx, opts: opts,
		seed: maphash.MakeSeed(), links: map[inode]string{},
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
		if err := d.findLinks("", lo.fd, up.fd); err != nil {
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
	ctx     context.Context
	opts    DiffOptions
	tar     *tar.Writer
	buffers [2][]byte

	// Of files with several names, which names those are in each tree, as far as both trees
	// have the name: what one tree lacks is removed or written anyway.
	seed                   maphash.Seed
	lowerLinks, upperLinks map[inode]nameSet

	links map[inode]string // names that the layer holds of files with several
}

type inode struct{ dev, ino uint64 }

// A nameSet stands for a set of paths: two that differ have the same sum only by a chance of
// one in 2^64, which nobody who does not know the seed can bring about.
type nameSet struct {
	n   int
	sum uint64
}

// A node is a file in a tree: a name in an open directory, and what is there.
type node struct {
	parent int // descriptor
	name   string
	path   string // from the top
	st     unix.Stat_t
	fd     int // of a directory, once it is open

	parentNode *node // in the upper tree
	written    bool  // the layer holds the directory
	xattrs     []xattr
	overlay    map[string][]byte // attributes of overlayfs
	read       bool              // both are
}

func (n *node) kind() uint32 { return n.st.Mode & unix.S_IFMT }
func (n *node) isDir() bool  { return n.kind() == unix.S_IFDIR }
func (n *node) inode() inode { return inode{uint64(n.st.Dev), n.st.Ino} }

func (n *node) close() {
	if n.fd >= 0 {
		_ = unix.Close(n.fd)
		n.fd = -1
	}
}

func (n *node) fail(verb string, err error) error {
	p := n.path
	if p == "" {
		p = "."
	}
	return fmt.Errorf("%s %s: %w", verb, quote(p), err)
}

func openTop(path string) (*node, error) {
	fd, err := sys.Open(path, sys.OpenDir&^unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		return nil, refused("open %s: %w", path, err)
	case errors.Is(err, unix.ENOENT):
		return nil, errclass.As(fmt.Errorf("open %s: %w", path, err), errdefs.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	n := &node{fd: fd, parent: -1}
	if err := sys.Fstat(fd, &n.st); err != nil {
		n.close()
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	return n, nil
}

// stat returns the name in a directory, nil where there is none or a socket.
func stat(parent int, dir, name string) (*node, error) {
	n := &node{parent: parent, name: name, path: join(dir, name), fd: -1}
	err := sys.Fstatat(parent, name, &n.st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, n.fail("stat", err)
	}
	if n.kind() == unix.S_IFSOCK {
		return nil, nil
	}
	return n, nil
}

// open opens a directory.
func (n *node) open() error {
	if n.fd >= 0 {
		return nil
	}
	fd, err := openBeneath(n.parent, n.name)
	if err != nil {
		return n.fail("open", err)
	}
	n.fd = fd
	return nil
}

// openFile opens a regular file, and sees that it is the one that was there.
func (n *node) openFile() (int, error) {
	fd, err := sys.Openat(n.parent, n.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, n.fail("open", err)
	}
	if err := n.unchanged(fd); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (n *node) unchanged(fd int) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return n.fail("stat", err)
	}
	if st.Dev != n.st.Dev || st.Ino != n.st.Ino || st.Mode != n.st.Mode || st.Size != n.st.Size || st.Mtim != n.st.Mtim {
		return n.fail("read", errors.New("changed meanwhile"))
	}
	return nil
}

// sortedNames lists a directory.
func sortedNames(fd int, dir string) ([]string, error) {
	if fd < 0 {
		return nil, nil
	}
	names, err := sys.Names(fd)
	if err != nil {
		return nil, (&node{path: dir}).fail("read directory", err)
	}
	slices.Sort(names)
	return names, nil
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

// findLinks records the names of files with several that both trees have.
func (d *differ) findLinks(dir string, lower, upper int) error {
	return d.each(dir, lower, upper, func(lo, up *node) error {
		switch {
		case up == nil:
			return nil
		case up.isDir() && (lo == nil || !lo.isDir()):
			lo = nil
		case !up.isDir():
			d.note(d.upperLinks, up)
			if lo != nil && !lo.isDir() {
				d.note(d.lowerLinks, lo)
			}
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
		return d.findLinks(up.path, fd, up.fd)
	})
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
	return d.each(up.path, lower, up.fd, func(lo, up2 *node) error {
		if up2 == nil {
			return d.whiteout(up, lo.name)
		}
		up2.parentNode = up
		return d.entry(lo, up2)
	})
}

// entry writes a file that upper has, as far as it differs from lower's, which may be nil.
func (d *differ) entry(lo, up *node) error {
	if isWhiteout(&up.st) {
		if !d.opts.Overlay {
			return up.notUpper("is a whiteout of overlayfs")
		}
		return d.whiteout(up.parentNode, up.name)
	}
	same := false
	if lo != nil {
		var err error
		if same, err = d.same(lo, up); err != nil {
			return err
		}
	}
	if up.isDir() {
		if err := up.open(); err != nil {
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
	if same {
		return nil
	}
	return d.write(up)
}

// same tells whether lower's file needs no entry to be upper's. Of directories it compares
// themselves alone.
func (d *differ) same(lo, up *node) (bool, error) {
	if !up.isDir() && d.namesOf(d.lowerLinks, lo) != d.namesOf(d.upperLinks, up) {
		return false, nil
	}
	if lo.inode() == up.inode() {
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
	if !slices.EqualFunc(lo.xattrs, up.xattrs, func(a, b xattr) bool { return a.name == b.name && bytes.Equal(a.value, b.value) }) {
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

func (n *node) readFull(fd int, p []byte) error {
	for len(p) > 0 {
		m, err := sys.Read(fd, p)
		if err != nil {
			return n.fail("read", err)
		}
		if m == 0 {
			return n.fail("read", errors.New("changed meanwhile"))
		}
		p = p[m:]
	}
	return nil
}

func (n *node) readlink() (string, error) {
	buf := make([]byte, maxPath+1)
	m, err := sys.Readlinkat(n.parent, n.name, buf)
	if err != nil {
		return "", n.fail("read link", err)
	}
	return string(buf[:m]), nil
}

// overlayDir writes the mark of an opaque directory.
func (d *differ) overlayDir(up *node) error {
	if err := d.readXattrs(up); err != nil {
		return err
	}
	if string(up.overlay["opaque"]) != "y" { // x tells that files in it may be whiteouts
		return nil
	}
	return d.mark(up, opaqueMarker)
}

func (d *differ) whiteout(dir *node, name string) error {
	if strings.HasPrefix(name, whiteoutPrefix) {
		return (&node{path: join(dir.path, name)}).fail("remove", unsayable("no layer can remove a file of such a name"))
	}
	return d.mark(dir, whiteoutPrefix+name)
}

func (d *differ) mark(dir *node, name string) error {
	if err := d.writeParents(dir); err != nil {
		return err
	}
	return d.header(&tar.Header{Typeflag: tar.TypeReg, Name: join(dir.path, name), ModTime: time.Unix(0, 0)})
}

func unsayable(text string) error { return errclass.As(errors.New(text), errdefs.ErrNotImplemented) }

// writeParents writes a directory and those above it that the layer does not hold yet.
func (d *differ) writeParents(dir *node) error {
	if dir == nil || dir.written {
		return nil
	}
	if err := d.writeParents(dir.parentNode); err != nil {
		return err
	}
	dir.written = true
	return d.write(dir)
}

// write writes the entry of a file or directory.
func (d *differ) write(n *node) error {
	if err := d.writeParents(n.parentNode); err != nil {
		return err
	}
	if strings.HasPrefix(n.name, whiteoutPrefix) {
		return n.fail("write", unsayable("no layer can hold a file of such a name"))
	}
	if err := d.readXattrs(n); err != nil {
		return err
	}
	if _, ok := n.overlay["whiteout"]; ok && n.kind() == unix.S_IFREG && n.parentNode != nil {
		return d.whiteout(n.parentNode, n.name)
	}
	uid, gid := keptOwner(n)
	h := &tar.Header{
		Name: n.path,
		Mode: int64(n.st.Mode & 0o7777),
		Uid:  int(uid), Gid: int(gid),
		ModTime: time.Unix(n.st.Mtim.Unix()),
	}
	if !d.opts.Latest.IsZero() && h.ModTime.After(d.opts.Latest) {
		h.ModTime = d.opts.Latest
	}
	if len(n.xattrs) > 0 {
		h.PAXRecords = map[string]string{}
		for _, x := range n.xattrs {
			if x.name == ownerAttribute && unix.Geteuid() != 0 {
				continue
			}
			if strings.Contains(x.name, "=") {
				return n.fail("write", unsayable("no layer can hold the attribute "+quote(x.name)))
			}
			h.PAXRecords["SCHILY.xattr."+x.name] = string(x.value)
		}
	}
	if !n.isDir() && n.st.Nlink > 1 {
		if first, ok := d.links[n.inode()]; ok {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
			return d.header(h)
		}
		d.links[n.inode()] = n.path
	}
	switch n.kind() {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if n.path == "" {
			h.Name = "./"
		}
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, n.st.Size
		return d.file(n, h)
	case unix.S_IFLNK:
		target, err := n.readlink()
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if n.kind() == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(n.st.Rdev)), int64(unix.Minor(n.st.Rdev))
	default:
		return n.fail("write", unsayable(fmt.Sprintf("no layer can hold a file of type %o", n.kind())))
	}
	return d.header(h)
}

// header writes an entry's header, in plain USTAR where that can say all.
func (d *differ) header(h *tar.Header) error {
	if len(h.Name) > maxPath {
		return fmt.Errorf("write %s: %w", quote(h.Name), unsayable(fmt.Sprintf("path of %d bytes", len(h.Name))))
	}
	if h.ModTime.Nanosecond() != 0 {
		h.Format = tar.FormatPAX
	}
	if err := d.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", quote(h.Name), err)
	}
	return nil
}

func (d *differ) file(n *node, h *tar.Header) error {
	fd, err := n.openFile()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := d.header(h); err != nil {
		return err
	}
	for left := h.Size; left > 0; {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		b := d.buffers[0][:min(left, compareSize)]
		if err := n.readFull(fd, b); err != nil {
			return err
		}
		if _, err := d.tar.Write(b); err != nil {
			return fmt.Errorf("write %s: %w", quote(h.Name), err)
		}
		left -= int64(len(b))
	}
	return n.unchanged(fd)
}

// hostXattrs belong to the host or its file system, as umoci has it.
var hostXattrs = []string{"security.selinux", "security.ima", "security.evm", "system.nfs4_acl"}

// readXattrs reads the attributes that a layer holds, in order, and those of overlayfs.
func (d *differ) readXattrs(n *node) error {
	if n.read {
		return nil
	}
	n.read = true
	names, err := n.listXattrs()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == "" || slices.Contains(hostXattrs, name) {
			continue
		}
		rest, overlay := overlayName(name)
		if overlay && !slices.Contains(overlayMarks, rest) {
			continue
		}
		v, err := n.xattr(name)
		switch {
		case err != nil:
			return err
		case v == nil: // it is gone
		case !overlay:
			n.xattrs = append(n.xattrs, xattr{name, v})
		case !d.opts.Overlay:
			return n.notUpper("has the overlayfs attribute " + quote(name))
		case rest == "metacopy" || rest == "redirect":
			return n.fail("read", unsayable("has the overlayfs attribute "+quote(name)+", so what it shows is elsewhere: mount with metacopy=off,redirect_dir=off"))
		default:
			if n.overlay == nil {
				n.overlay = map[string][]byte{}
			}
			n.overlay[rest] = v
		}
	}
	return nil
}

// overlayMarks are the attributes by which overlayfs makes a file another than it is.
var overlayMarks = []string{"opaque", "whiteout", "metacopy", "redirect"}

func (n *node) notUpper(what string) error {
	return errclass.As(n.fail("read", errors.New(what+": only an upper directory, read as one, may have it")), errdefs.ErrInvalidArgument)
}

// procPath leads to the name itself in the directory that is open, whatever it is.
func (n *node) procPath() string { return fmt.Sprintf("/proc/self/fd/%d/%s", n.parent, n.name) }

func (n *node) listXattrs() ([]string, error) {
	b, err := sys.Grow(func(buf []byte) (int, error) {
		if n.fd >= 0 {
			return unix.Flistxattr(n.fd, buf)
		}
		return unix.Llistxattr(n.procPath(), buf)
	})
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		return nil, n.fail("list attributes of", err)
	}
	names := strings.Split(string(b), "\x00")
	slices.Sort(names)
	return names, nil
}

// xattr returns an attribute's value, nil where there is none.
func (n *node) xattr(name string) ([]byte, error) {
	b, err := sys.Grow(func(buf []byte) (int, error) {
		if n.fd >= 0 {
			return unix.Fgetxattr(n.fd, name, buf)
		}
		return unix.Lgetxattr(n.procPath(), name, buf)
	})
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP),
		errors.Is(err, unix.EPERM): // user attributes of what is neither file nor directory
		return nil, nil
	case err != nil:
		return nil, n.fail("read attribute "+quote(name)+" of", err)
	}
	return b, nil
}
