package archive

import (
	"encoding/binary"
	"slices"
	"strconv"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ownerAttribute holds the owner of a file that an unprivileged user can't give away, as PRoot and umoci do:
// https://github.com/rootless-containers/proto. The value is a protocol buffer with the user in field 1 and the group
// in field 2; 0 may be omitted. noOwner means the file's own owner, which is root inside the tree.
const (
	ownerAttribute = "user.rootlesscontainers"
	noOwner        = 1<<32 - 1
)

func encodeOwner(uid, gid uint32) []byte {
	var b []byte
	for field, id := range []uint32{1: uid, 2: gid} {
		if id != 0 {
			b = binary.AppendUvarint(append(b, byte(field)<<3), uint64(id))
		}
	}
	return b
}

func decodeOwner(b []byte) (uid, gid uint32, ok bool) {
	ids := [3]uint32{}
	for len(b) > 0 {
		field := b[0] >> 3
		id, n := binary.Uvarint(b[1:])
		if b[0]&7 != 0 || field != 1 && field != 2 || n <= 0 || id > noOwner {
			return 0, 0, false
		}
		if id == noOwner {
			id = 0
		}
		ids[field] = uint32(id)
		b = b[1+n:]
	}
	return ids[1], ids[2], true
}

// An IDMap maps user or group IDs of a layer to those of files. An empty map changes nothing.
type IDMap []IDRange

// An IDRange maps Size IDs: those of the layer, beginning with Layer, to those of files, beginning with File.
type IDRange struct{ Layer, File, Size uint32 }

// ParseIDMap parses ranges of the form LAYER:FILE or LAYER:FILE:SIZE, as in umoci. ErrInvalidArgument if one is
// malformed.
func ParseIDMap(ranges []string) (m IDMap, err error) {
	for _, s := range ranges {
		r, err := parseIDRange(s)
		if err != nil {
			return nil, err
		}
		m = append(m, r)
	}
	return m, nil
}

func parseIDRange(s string) (IDRange, error) {
	fields := strings.Split(s, ":")
	if len(fields) == 2 {
		fields = append(fields, "1")
	}
	var n [3]uint64
	for i, f := range fields {
		var err error
		if len(fields) != len(n) {
			return IDRange{}, invalid("%q is not of the form LAYER:FILE:SIZE", s)
		}
		if n[i], err = strconv.ParseUint(f, 10, 32); err != nil {
			return IDRange{}, invalid("%q: %w", s, err)
		}
	}
	if n[2] == 0 || max(n[0], n[1])+n[2] > noOwner {
		return IDRange{}, invalid("%q: it exceeds the largest ID", s)
	}
	return IDRange{uint32(n[0]), uint32(n[1]), uint32(n[2])}, nil
}

// file maps an ID of the layer to that of files, and layer does the reverse. ok is false if the ID is not mapped.
func (m IDMap) file(id uint32) (mapped uint32, ok bool) {
	for _, r := range m {
		if id >= r.Layer && id-r.Layer < r.Size {
			return id - r.Layer + r.File, true
		}
	}
	return id, len(m) == 0
}

func (m IDMap) layer(id uint32) (mapped uint32, ok bool) {
	for _, r := range m {
		if id >= r.File && id-r.File < r.Size {
			return id - r.File + r.Layer, true
		}
	}
	return id, len(m) == 0
}

// File capabilities (capabilities(7), linux/capability.h). Revision 2 is for root of the host. Revision 3 is for user
// namespaces whose root is the user ID at its end.
const (
	capabilityAttribute = "security.capability"
	capabilityRevision  = 0xff000000
	capability2Size     = 20
)

// mapCapability maps the root user ID of file capabilities by root. ok is false if root doesn't map it.
func mapCapability(v []byte, root func(uint32) (uint32, bool)) (mapped []byte, ok bool) {
	if len(v) < capability2Size {
		return v, true // left to the kernel, which refuses it
	}
	id := uint32(0)
	if len(v) > capability2Size {
		v, id = v[:capability2Size], binary.LittleEndian.Uint32(append(v[capability2Size:len(v):len(v)], 0, 0, 0))
	}
	if id, ok = root(id); !ok {
		return nil, false
	}
	revision, size := uint32(2<<24), capability2Size
	if id != 0 {
		revision, size = 3<<24, capability2Size+4
	}
	mapped = binary.LittleEndian.AppendUint32(slices.Clone(v), id)[:size]
	binary.LittleEndian.PutUint32(mapped, binary.LittleEndian.Uint32(v)&^capabilityRevision|revision)
	return mapped, true
}

// ownerOf returns the owner that the layer gives a file. For a user who can't give files away it is that in the file's
// attribute, if any, or root in place of the user.
func (d *differ) ownerOf(n *node) (uid, gid uint32, err error) {
	if !d.chowns {
		for _, x := range n.xattrs {
			if x.Name == ownerAttribute {
				if uid, gid, ok := decodeOwner(x.Value); ok {
					return uid, gid, nil
				}
			}
		}
	}
	own := func(m IDMap, id uint32, self int) (uint32, error) {
		if len(m) == 0 && !d.chowns && int(id) == self {
			return 0, nil
		}
		mapped, ok := m.layer(id)
		if !ok {
			return 0, n.fail("write", errclass.Errorf(errdefs.ErrFailedPrecondition, "its owner %d is not mapped to one of the layer", id))
		}
		return mapped, nil
	}
	if uid, err = own(d.opts.UIDs, n.st.Uid, unix.Geteuid()); err == nil {
		gid, err = own(d.opts.GIDs, n.st.Gid, unix.Getegid())
	}
	return uid, gid, err
}
