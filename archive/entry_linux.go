package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"distkit/disk/sys"
	"distkit/layer"

	"golang.org/x/sys/unix"
)

func (a *applier) entry(h *tar.Header) error {
	if len(h.Name) > layer.MaxPath {
		return refused("name of %d bytes", len(h.Name))
	}
	name := layer.Clean(h.Name)
	if !a.wanted(name) {
		return nil
	}
	if strings.HasPrefix(name, layer.MetaPrefix) && name != layer.OpaqueMarker && !a.opts.Archive {
		return nil // what aufs kept for itself at the top of a layer
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir || a.opts.Archive {
			return nil
		}
		d, err := a.tree.lookup(a.opts.Below)
		if err != nil {
			return err
		}
		return a.directory(h, d, false)
	}
	parent, base := layer.Split(a.below(name))
	if strings.HasPrefix(base, layer.WhiteoutPrefix) && !a.opts.Archive {
		return a.whiteout(parent, base)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		d, err := a.tree.lookup(parent)
		if err != nil {
			return err
		}
		c, made, err := a.tree.mkdir(d, base, uint32(h.Mode)&0o7777)
		if err != nil {
			return err
		}
		return a.directory(h, c, made)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return a.regular(h, parent, base)
	case tar.TypeLink:
		return a.link(h, parent, base)
	case tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return a.special(h, parent, base)
	}
	return refused("type %q is not supported", h.Typeflag)
}

// below returns a path in the target for one in the layer.
func (a *applier) below(name string) string {
	if a.opts.Below == "" {
		return name
	}
	return join(a.opts.Below, name)
}

// wanted reports whether Only and Exclude leave an entry in: by its name, or that of the file that a whiteout is for.
func (a *applier) wanted(name string) bool {
	dir, base := layer.Split(name)
	whiteout := strings.HasPrefix(base, layer.WhiteoutPrefix)
	switch {
	case base == layer.OpaqueMarker:
		name = dir
	case whiteout:
		name = join(dir, strings.TrimPrefix(base, layer.WhiteoutPrefix))
	}
	return a.selected.has(name, !whiteout)
}

// A selection is of paths of a layer: those of only, or all if that is empty, without those of exclude; each with what is below it.
type selection struct{ only, exclude []string }

func newSelection(only, exclude []string) selection {
	return selection{cleanAll(only), cleanAll(exclude)}
}

// has reports whether a path is selected. onTheWay also selects what leads to it: a directory is wanted for its attributes, a symbolic link
// for where it leads.
func (s selection) has(name string, onTheWay bool) bool {
	return !slices.ContainsFunc(s.exclude, func(p string) bool { return within(name, p) }) &&
		(len(s.only) == 0 || slices.ContainsFunc(s.only, func(p string) bool { return within(name, p) || onTheWay && within(p, name) }))
}

// whole reports whether a path is selected with all that is below it.
func (s selection) whole(name string) bool {
	return s.has(name, false) && !slices.ContainsFunc(s.exclude, func(p string) bool { return within(p, name) })
}

// within reports whether a path is dir, or below it.
func within(p, dir string) bool {
	rest, ok := strings.CutPrefix(p, dir)
	return ok && (dir == "" || rest == "" || rest[0] == '/')
}

// directory gives an open directory what the entry says; made tells that it was made for it.
func (a *applier) directory(h *tar.Header, d *dir, made bool) error {
	t := a.tree
	t.touch(d)
	t.named(d.path)
	f, err := a.newFile(h)
	if err != nil {
		return err
	}
	f.fd = d.fd
	if made {
		f.chmod = false
		f.owner = !d.owns(f)
		if !t.privileged {
			f.mode |= 0o700 // until the directory is closed
		}
	} else {
		if err := clearXattrs(d.fd); err != nil {
			return err
		}
		d.setMode = false
		if !t.privileged && f.mode&0o700 != 0o700 {
			d.mode, d.setMode = f.mode, true
			f.mode |= 0o700
		}
	}
	if !made || len(f.xattrs) > 0 {
		d.probed = false
	}
	d.times = &[2]unix.Timespec{f.times[0], f.times[1]}
	return a.attributes(&f)
}

// owns tells whether a file made in d, or d if it was just made, has the owner it shall have.
func (d *dir) owns(f file) bool {
	return d.probed && f.uid == d.uid && f.gid == d.gid && !f.unmapped
}

// newFile takes an entry's attributes. All are to be set.
func (a *applier) newFile(h *tar.Header) (file, error) {
	const most = int(^uint32(0)) // itself means "leave it" to chown
	if h.Uid < 0 || h.Uid >= most || h.Gid < 0 || h.Gid >= most {
		return file{}, refused("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	uid, mapped := a.opts.UIDs.file(uint32(h.Uid))
	gid, gidMapped := a.opts.GIDs.file(uint32(h.Gid))
	access := h.AccessTime
	if access.Before(h.ModTime) {
		access = h.ModTime
	}
	f := file{
		fd: -1, name: h.Name,
		owner: true, uid: uid, gid: gid, layerUID: uint32(h.Uid), layerGID: uint32(h.Gid), unmapped: !mapped || !gidMapped,
		chmod: true, mode: uint32(h.Mode) & 0o7777, isDir: h.Typeflag == tar.TypeDir,
		times: [2]unix.Timespec{timespec(access), timespec(h.ModTime)},
	}
	var err error
	if len(h.PAXRecords) > 0 {
		f.xattrs, err = layer.Xattrs(h.PAXRecords)
	}
	for i, x := range f.xattrs {
		if x.Name == capabilityAttribute && len(a.opts.UIDs) > 0 {
			var ok bool
			if f.xattrs[i].Value, ok = mapCapability(x.Value, a.opts.UIDs.file); !ok {
				f.xattrs = slices.Delete(f.xattrs, i, i+1)
				return f, a.tolerate("security attributes", "set attribute "+x.Name, unix.EPERM)
			}
			break
		}
	}
	return f, err
}

func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// create makes the new file base in d by the system call in call, in place of what is there.
func (a *applier) create(d *dir, base string, call func() error) error {
	if err := a.tree.check(d, base); err != nil {
		return err
	}
	err := call()
	if errors.Is(err, unix.EEXIST) {
		if err := a.tree.remove(d, base); err != nil {
			return err
		}
		err = call()
	}
	if err == nil {
		a.tree.wrote(d, base)
	}
	return err
}

func (a *applier) regular(h *tar.Header, parent, base string) error {
	f, err := a.newFile(h)
	if err != nil {
		return err
	}
	if layer.Sparse(h) {
		if h.Size > layer.MaxSparse-a.sparse {
			return refused("sparse files have more than %d bytes together", int64(layer.MaxSparse))
		}
		if a.sparse += h.Size; a.opts.MaxBytes > 0 && a.sparse > a.opts.MaxBytes {
			return tooMuch("sparse files have more than %d bytes together", a.opts.MaxBytes)
		}
	}
	d, err := a.tree.lookup(parent)
	if err != nil {
		return err
	}
	a.tree.probe(d)
	err = a.create(d, base, func() (err error) {
		f.fd, err = sys.Openat(d.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, f.mode&0o777)
		return err
	})
	if err != nil {
		return err
	}
	if d.acl {
		if err := dropACLs(f.fd, accessACL); err != nil {
			_ = unix.Close(f.fd)
			return err
		}
	}
	f.owner = !d.owns(f)
	f.chmod = f.mode&0o7000 != 0 || f.mode&^d.mask != f.mode
	if h.Size <= smallFile && !layer.Sparse(h) {
		return a.small(f, int(h.Size))
	}
	if err := a.large(h, f.fd); err != nil {
		_ = unix.Close(f.fd)
		return err
	}
	return a.complete(&f)
}

func (a *applier) link(h *tar.Header, parent, base string) error {
	target, err := layer.LinkTarget(h)
	if err != nil {
		return err
	}
	tparent, tbase := layer.Split(a.below(target))
	t := a.tree
	from, err := t.existing(tparent)
	if target, ok := t.lowerPath(tbase, err); ok {
		return a.unresolvedLink(parent, base, target)
	}
	if err != nil {
		return refused("hard link to %s: %w", quote(h.Linkname), err)
	}
	d, err := t.lookup(parent, from)
	if err != nil {
		return err
	}
	if from == d && tbase == base {
		return refused("hard link to itself")
	}
	// Nothing is removed to make way for a link that can't be.
	var st unix.Stat_t
	err = sys.Fstatat(from.fd, tbase, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		if target, ok := t.lowerPath(tbase, &missing{dir: from}); ok {
			return a.unresolvedLink(parent, base, target)
		}
	}
	if err == nil && t.opaque != "" && isWhiteout(&st) {
		err = unix.ENOENT
	}
	if err != nil {
		return refused("hard link to %s: %w", quote(h.Linkname), err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return refused("hard link to the directory %s", quote(h.Linkname))
	}
	if p := join(d.path, base); from.path == p || strings.HasPrefix(from.path, p+"/") {
		return refused("hard link to %s, which it would replace", quote(h.Linkname))
	}
	if err := a.create(d, base, func() error { return sys.Linkat(from.fd, tbase, d.fd, base, 0) }); err != nil {
		return err
	}
	if source := join(from.path, tbase); t.report != nil && has(t.report.links, t.under(from.hash, tbase)) {
		t.report.links[t.under(d.hash, base)] = struct{}{}
		t.record(recordLink, join(d.path, base), source)
	}
	return nil
}

// special makes what is not opened: symbolic links, devices and fifos.
func (a *applier) special(h *tar.Header, parent, base string) error {
	f, err := a.newFile(h)
	if err != nil {
		return err
	}
	d, err := a.tree.lookup(parent)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
		return a.whiteoutDevice(d, base)
	}
	a.tree.probe(d)
	call := func() error { return sys.Symlinkat(h.Linkname, d.fd, base) }
	if h.Typeflag != tar.TypeSymlink {
		kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		var device uint64
		if h.Typeflag != tar.TypeFifo {
			if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
				return refused("device number %d:%d is out of range", h.Devmajor, h.Devminor)
			}
			device = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		}
		call = func() error { return sys.Mknodat(d.fd, base, kind|f.mode&0o777, int(device)) }
	}
	err = a.create(d, base, call)
	if errors.Is(err, unix.EPERM) && (h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock) {
		return a.tolerate("devices", "create device", err)
	}
	if err != nil {
		return err
	}
	if !d.owns(f) {
		if err := a.chown(&f, func() error { return sys.Fchownat(d.fd, base, int(f.uid), int(f.gid), unix.AT_SYMLINK_NOFOLLOW) }); err != nil {
			return err
		}
	}
	// The directory by descriptor, and in it the entry itself whatever it is.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", d.fd, base)
	if d.acl && h.Typeflag != tar.TypeSymlink {
		if err := ignore(unix.Lremovexattr(path, accessACL), unix.ENODATA, unix.ENOTSUP); err != nil {
			return fmt.Errorf("remove %s: %w", accessACL, err)
		}
	}
	if h.Typeflag != tar.TypeSymlink && (f.mode&0o7000 != 0 || f.mode&^d.mask != f.mode) {
		if err := chmodat(d.fd, base, f.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := a.setXattrs(f.xattrs, func(x layer.Xattr) error { return sys.Lsetxattr(path, x.Name, x.Value, 0) }); err != nil {
		return err
	}
	if err := sys.UtimesNanoAt(d.fd, base, f.times[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// chmodat changes the mode of what is at base, never of what a symbolic link there leads to.
func chmodat(fd int, base string, mode uint32) error {
	err := sys.Fchmodat(fd, base, mode, unix.AT_SYMLINK_NOFOLLOW)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	p, err := sys.Openat(fd, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(p)
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", p), mode)
}
