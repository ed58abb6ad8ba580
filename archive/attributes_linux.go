package archive

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"distkit/disk/sys"
	"distkit/layer"

	"golang.org/x/sys/unix"
)

// A file is an open file whose attributes are still to be set.
type file struct {
	fd                 int
	name               string
	owner              bool
	uid                uint32 // the owner to set
	gid                uint32
	layerUID, layerGID uint32 // the owner in the layer
	unmapped           bool   // the owner in the layer has no counterpart
	mode               uint32
	chmod              bool
	isDir              bool
	times              [2]unix.Timespec
	xattrs             []layer.Xattr
}

// attributes sets the owner, the mode and the extended attributes, in this order, because a change of owner clears the
// set-user-ID bit and capabilities.
func (a *applier) attributes(f *file) error {
	if f.owner {
		f.chmod = f.chmod || f.mode&0o6000 != 0
		if err := a.chown(f, func() error { return sys.Fchown(f.fd, int(f.uid), int(f.gid)) }); err != nil {
			return err
		}
	}
	xattrs := f.xattrs
	if !a.tree.chowns && !a.opts.Strict {
		xattrs = slices.DeleteFunc(xattrs, func(x layer.Xattr) bool { return x.Name == ownerAttribute })
		if f.layerUID != 0 || f.layerGID != 0 {
			xattrs = append(xattrs, layer.Xattr{Name: ownerAttribute, Value: encodeOwner(f.layerUID, f.layerGID)})
		}
	}
	// An unprivileged user may set attributes only on a writable file.
	locked := !a.tree.privileged && len(xattrs) > 0 && f.mode&0o200 == 0
	if locked {
		if err := sys.Fchmod(f.fd, f.mode|0o200); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	} else if f.chmod {
		if err := sys.Fchmod(f.fd, f.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := a.setXattrs(xattrs, func(x layer.Xattr) error { return sys.Fsetxattr(f.fd, x.Name, x.Value, 0) }); err != nil {
		return err
	}
	if locked {
		if err := sys.Fchmod(f.fd, f.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	return nil
}

// chown calls set to change a file's owner. If that is not permitted, the file gets no set-ID bits, which would grant
// the rights of its present owner.
func (a *applier) chown(f *file, set func() error) error {
	err := error(unix.EINVAL)
	if !f.unmapped {
		err = set()
	}
	if err == nil {
		return nil
	}
	if err := a.tolerate("owners", "set owner", err); err != nil {
		return err
	}
	if f.isDir || f.mode&0o6000 == 0 {
		return nil
	}
	f.mode &^= 0o6000
	return a.tolerate("set-ID bits", "set mode", unix.EPERM)
}

func (a *applier) setXattrs(xattrs []layer.Xattr, set func(layer.Xattr) error) error {
	for _, x := range xattrs {
		kind := x.Kind()
		if rest, ok := layer.OverlayName(x.Name); ok {
			// Layers must not set overlayfs attributes. In overlay form they are stored escaped (overlay.overlay.*); otherwise, and
			// with a report, they are dropped and counted.
			if a.tree.opaque == "" || a.tree.report != nil {
				if err := a.tolerate("overlay attributes", "set attribute "+quote(x.Name), unix.EPERM); err != nil {
					return err
				}
				continue
			}
			x.Name = strings.TrimSuffix(x.Name, rest) + "overlay." + rest
		}
		if kind == "ACLs" {
			if err := a.tolerate(kind, "set "+x.Name, unix.ENOTSUP); err != nil {
				return err
			}
			continue
		}
		err := a.attributeError(set(x))
		if err := a.tolerate(kind, "set attribute "+quote(x.Name), err); err != nil {
			return err
		}
	}
	return nil
}

// attributeError adds ENOTSUP to errors by which a file system says that it can't hold an attribute of this size or
// value.
func (a *applier) attributeError(err error) error {
	switch err {
	case unix.E2BIG, unix.ERANGE, unix.EINVAL:
		return fmt.Errorf("%w: %w", unix.ENOTSUP, err)
	case unix.ENOSPC: // ext4 also returns it for an attribute larger than a block
		var fs unix.Statfs_t
		if unix.Fstatfs(a.tree.root.fd, &fs) == nil && fs.Bavail > 256 {
			return fmt.Errorf("%w: %w", unix.ENOTSUP, err)
		}
	}
	return err
}

// tolerate counts an attribute that can't be set because of missing rights or support, and returns nil. With Strict it
// returns the error.
func (a *applier) tolerate(kind, verb string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", verb, err)
	switch {
	case a.opts.Strict:
		return err
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOTSUP):
	case kind == "owners" && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES)): // not mapped in this user namespace
	default:
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.unset == nil {
		a.unset = map[string]int64{}
	}
	a.unset[kind]++
	return nil
}

// clearXattrs removes all attributes from a directory of a lower layer: an entry of this layer lists all that the
// directory is to have.
func clearXattrs(fd int) error {
	buf := make([]byte, 1<<10)
	n, err := unix.Flistxattr(fd, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10)
		n, err = unix.Flistxattr(fd, buf)
	}
	if err != nil {
		return ignore(err, unix.ENOTSUP)
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if _, overlay := layer.OverlayName(name); name == "" || overlay || name == "security.selinux" {
			continue
		}
		if err := unix.Fremovexattr(fd, name); err != nil {
			if err := ignore(err, unix.EPERM, unix.ENOTSUP, unix.ENODATA, unix.EACCES); err != nil {
				return fmt.Errorf("remove attribute %s: %w", quote(name), err)
			}
		}
	}
	return nil
}

// dropACLs removes the ACLs that a new file or directory inherited: a layer's entry lists all attributes.
func dropACLs(fd int, names ...string) error {
	for _, name := range names {
		if err := ignore(unix.Fremovexattr(fd, name), unix.ENODATA, unix.ENOTSUP); err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
	}
	return nil
}
