package archive

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// ownerAttribute is where an owner is kept that an ordinary user can't give a file, as PRoot and umoci
// do: https://github.com/rootless-containers/proto. Its value is a protocol buffer of two numbers, the
// user in field 1 and the group in field 2, of which 0 may be left out. noOwner says that the file's
// own counts, which is that of who is root in the tree.
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

// keptOwner is the owner that n's attribute tells an ordinary user, else the one that it has.
func keptOwner(n *node) (uid, gid uint32) {
	for _, x := range n.xattrs {
		if x.name == ownerAttribute && unix.Geteuid() != 0 {
			if uid, gid, ok := decodeOwner(x.value); ok {
				return uid, gid
			}
		}
	}
	return n.st.Uid, n.st.Gid
}
