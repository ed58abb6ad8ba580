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
		return invalid("name of %d bytes", len(h.Name))
	}
	name := layer.Clean(h.Name)
	if !a.wanted(name) {
		return nil
	}
	if strings.HasPrefix(name, layer.MetaPrefix) && name != layer.OpaqueMarker && !a.opts.Archive {
		return nil // metadata that aufs keeps at the top of a layer
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
	return invalid("type %q is not supported", h.Typeflag)
}

// below turns a path in the layer into one in the target.
func (a *applier) below(name string) string {
	if a.opts.Below == "" {
		return name
	}
	return join(a.opts.Below, name)
}

// wanted reports whether Only and Exclude select an entry, by its name or by the name that a whiteout hides.
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

// A selection selects paths of a layer: those in only and below, or all if only is empty, without those in exclude and
// below.
type selection struct{ only, exclude []string }

func newSelection(only, exclude []string) selection {
	return selection{cleanAll(only), cleanAll(exclude)}
}

// has reports whether a path is selected. With onTheWay it also selects what leads to a selected path: directories,
// whose attributes are needed, and symbolic links, which may lead there.
func (s selection) has(name string, onTheWay bool) bool {
	return !slices.ContainsFunc(s.exclude, func(p string) bool { return within(name, p) }) &&
		(len(s.only) == 0 || slices.ContainsFunc(s.only, func(p string) bool { return within(name, p) || onTheWay && within(p, name) }))
}

// whole reports whether a path is selected together with everything below it.
func (s selection) whole(name string) bool {
	return s.has(name, false) && !slices.ContainsFunc(s.exclude, func(p string) bool { return within(p, name) })
}

// within reports whether a path is dir or below it.
func within(p, dir string) bool {
	rest, ok := strings.CutPrefix(p, dir)
	return ok && (dir == "" || rest == "" || rest[0] == '/')
}

// directory applies an entry to an open directory. made says that it was created for this entry.
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

// owns reports whether a file created in d, or d itself if it was just created, already has the owner that f is to
// have.
func (d *dir) owns(f file) bool {
	return d.probed && f.uid == d.uid && f.gid == d.gid && !f.unmapped
}

// newFile returns a file with an entry's attributes, all of them still to be set.
func (a *applier) newFile(h *tar.Header) (file, error) {
	const most = int(^uint32(0)) // chown(2) takes this value for "unchanged"
	if h.Uid < 0 || h.Uid >= most || h.Gid < 0 || h.Gid >= most {
		return file{}, invalid("owner %d:%d is out of range", h.Uid, h.Gid)
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

// create creates the file base in d with a system call. It removes what is there before.
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
			return invalid("sparse files have more than %d bytes together", int64(layer.MaxSparse))
		}
		if a.sparse += h.Size; a.opts.MaxBytes > 0 && a.sparse > a.opts.MaxBytes {
			return overLimit("sparse files have more than %d bytes together", a.opts.MaxBytes)
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
		return a.queueSmall(f, int(h.Size))
	}
	if err := a.copyLarge(h, f.fd); err != nil {
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
		return invalid("hard link to %s: %w", quote(h.Linkname), err)
	}
	d, err := t.lookup(parent, from)
	if err != nil {
		return err
	}
	if from == d && tbase == base {
		return invalid("hard link to itself")
	}
	// Check the target before anything is removed for the link.
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
		return invalid("hard link to %s: %w", quote(h.Linkname), err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return invalid("hard link to the directory %s", quote(h.Linkname))
	}
	if p := join(d.path, base); from.path == p || strings.HasPrefix(from.path, p+"/") {
		return invalid("hard link to %s, which it would replace", quote(h.Linkname))
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

// special creates files that can't be opened for writing: symbolic links, devices and FIFOs.
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
				return invalid("device number %d:%d is out of range", h.Devmajor, h.Devminor)
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
	// Names the entry itself in the open directory, without following it.
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

// chmodat changes the mode of a file, but not through a symbolic link.
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
