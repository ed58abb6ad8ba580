package erofs

import (
	"archive/tar"
	"strings"

	"distkit/layer"
)

const opaqueAttribute = "trusted.overlay.opaque"

// attributes copies to n what its entry says, except what depends on its type.
func (a *adder) attributes(n *inode, h *tar.Header) error {
	const most = 1<<32 - 1 // an owner of 2^32-1 means "leave it" to chown
	if h.Uid < 0 || h.Uid >= most || h.Gid < 0 || h.Gid >= most {
		return refused("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	n.mode = n.mode&typeMask | uint16(h.Mode&0o7777)
	n.uid, n.gid = uint32(h.Uid), uint32(h.Gid)
	n.seconds, n.nanoseconds = h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())
	n.rare = nil // an entry replaces the attributes that a lower layer gave the directory
	if len(h.PAXRecords) == 0 {
		return nil
	}
	xattrs, err := layer.Xattrs(h.PAXRecords)
	if err != nil {
		return err
	}
	size := xattrSize(opaqueAttribute, nil)
	for _, x := range xattrs {
		kind, ok := a.holds(n, &x)
		if ok && x.Value == nil {
			continue // the mode says the same as this ACL
		}
		if ok {
			_, suffix := splitXattr(x.Name)
			size += xattrSize(suffix, x.Value)
			ok = size <= maxXattrs
		}
		if !ok {
			a.unset[kind]++
			continue
		}
		if err := a.tree.Charge(int64(len(x.Name) + len(x.Value) + rareMemory)); err != nil {
			return err
		}
		more := n.more()
		more.xattrs = append(more.xattrs, x)
	}
	return nil
}

// holds reports whether an image can hold an attribute. If it can't, kind is the attribute's kind for Unset. holds
// changes the attribute to what the kernel would make of it.
func (a *adder) holds(n *inode, x *layer.Xattr) (kind string, ok bool) {
	class, rest, _ := strings.Cut(x.Name, ".")
	kind = x.Kind()
	if rest, overlay := layer.OverlayName(x.Name); overlay {
		// Layers must not set overlayfs attributes. In overlay form they are stored escaped.
		if !a.opts.Overlay {
			return "overlay attributes", false
		}
		x.Name = class + ".overlay.overlay." + rest
	}
	if len(x.Name) > maxName || len(x.Value) >= 1<<16 || strings.IndexByte(x.Name, 0) >= 0 {
		return kind, false
	}
	t := n.mode & typeMask
	switch class {
	case "user":
		return kind, rest != "" && (t == typeFile || t == typeDir)
	case "trusted":
		return kind, rest != ""
	case "security":
		return kind, rest != "" && (rest != "capability" || isCapability(x.Value))
	}
	switch x.Name {
	case accessACL:
		return kind, t != typeSymlink && applyACL(n, x)
	case defaultACL:
		return kind, t == typeDir && applyACL(n, x)
	}
	return kind, false
}

// isCapability reports whether the kernel accepts v as a value of security.capability: its size fits its revision.
func isCapability(v []byte) bool {
	sizes := map[uint32]int{0x01000000: 12, 0x02000000: 20, 0x03000000: 24}
	return len(v) >= 4 && sizes[little.Uint32(v)&0xff000000] == len(v)
}

const (
	accessACL  = "system.posix_acl_access"
	defaultACL = "system.posix_acl_default"

	aclVersion                                                              = 2
	aclUserObj, aclUser, aclGroupObj, aclGroup, aclMask, aclOther, aclMarks = 1, 2, 4, 8, 16, 32, 8
)

// applyACL reports whether a POSIX ACL is valid. As in the kernel, an access ACL changes the mode. One that says no
// more than the mode is dropped: its value becomes nil.
func applyACL(n *inode, x *layer.Xattr) bool {
	v := x.Value
	if len(v) < 4 || (len(v)-4)%aclMarks != 0 || little.Uint32(v) != aclVersion {
		return false
	}
	var perm [aclOther + 1]uint16
	last, named, seen := uint16(0), false, uint16(0)
	for e := v[4:]; len(e) > 0; e = e[aclMarks:] {
		tag, p := little.Uint16(e), little.Uint16(e[2:])
		switch tag {
		case aclUser, aclGroup:
			named = true
			if tag < last {
				return false
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			if tag <= last {
				return false
			}
		default:
			return false
		}
		if p > 7 {
			return false
		}
		perm[tag], last, seen = p, tag, seen|tag
	}
	switch must := uint16(aclUserObj | aclGroupObj | aclOther); {
	case seen == 0:
		x.Value = nil
		return true
	case seen&must != must, named && seen&aclMask == 0:
		return false
	}
	if x.Name == defaultACL {
		return true
	}
	group := perm[aclGroupObj]
	if seen&aclMask != 0 {
		group = perm[aclMask]
	} else {
		x.Value = nil
	}
	n.mode = n.mode&^0o777 | perm[aclUserObj]<<6 | group<<3 | perm[aclOther]
	return true
}

// splitXattr splits an attribute's name into the number of its prefix and the rest.
func splitXattr(name string) (index byte, suffix string) {
	switch name {
	case accessACL:
		return 2, ""
	case defaultACL:
		return 3, ""
	}
	class, suffix, _ := strings.Cut(name, ".")
	return map[string]byte{"user": 1, "trusted": 4, "security": 6}[class], suffix
}

func xattrSize(suffix string, value []byte) int64 {
	return align(int64(xattrEntry+len(suffix)+len(value)), 4)
}

func align(n, to int64) int64 { return (n + to - 1) / to * to }

// eachXattr yields the attributes of a file that the image stores.
func (n *inode) eachXattr(yield func(layer.Xattr) bool) {
	if n.opaque && !yield(layer.Xattr{Name: opaqueAttribute, Value: []byte("y")}) || n.rare == nil {
		return
	}
	for _, x := range n.rare.xattrs {
		if !yield(x) {
			return
		}
	}
}

// xattrsSize returns the number of bytes of a file's attributes after its inode.
func (n *inode) xattrsSize() int64 {
	size := int64(0)
	for x := range n.eachXattr {
		if size == 0 {
			size = xattrHeader
		}
		_, suffix := splitXattr(x.Name)
		size += xattrSize(suffix, x.Value)
	}
	return size
}

// xattrs writes the attributes of a file that has some.
func (im *image) xattrs(n *inode) error {
	if err := im.out.write(padding[:xattrHeader]); err != nil {
		return err
	}
	for x := range n.eachXattr {
		index, suffix := splitXattr(x.Name)
		b := make([]byte, xattrSize(suffix, x.Value))
		b[0], b[1] = byte(len(suffix)), index
		little.PutUint16(b[2:], uint16(len(x.Value)))
		copy(b[xattrEntry:], suffix)
		copy(b[xattrEntry+len(suffix):], x.Value)
		if err := im.out.write(b); err != nil {
			return err
		}
	}
	return nil
}
