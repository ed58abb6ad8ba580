package archive

import (
	"bytes"
	"encoding/binary"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unchanged reports whether two files are known to be equal in all that a layer holds, without a look at their content: both are one
// inode of the layers of two overlayfs mounts, or the inode has not changed since one btrfs snapshot was made of the other.
func (d *differ) unchanged(lo, up *node) bool {
	a, b := &lo.st, &up.st
	if a.Ino != b.Ino || a.Ctim != b.Ctim || a.Mtim != b.Mtim || a.Size != b.Size || a.Mode != b.Mode || up.isDir() {
		return false
	}
	if d.tops[0].overlay && d.tops[1].overlay {
		return a.Dev == d.tops[0].dev && b.Dev == d.tops[1].dev && sameOverlayFile(lo, up)
	}
	return !d.parted.IsZero() && a.Dev == d.tops[0].dev && b.Dev == d.tops[1].dev && time.Unix(a.Ctim.Unix()).Before(d.parted)
}

// A top is what the file system of a tree says about files in it.
type top struct {
	dev     uint64
	overlay bool
}

// know finds out how files of the two trees can be known as unchanged.
func (d *differ) know(lo, up *node) {
	var types [2]int64
	for i, n := range []*node{lo, up} {
		var fs unix.Statfs_t
		if unix.Fstatfs(n.fd, &fs) != nil {
			return
		}
		types[i] = int64(fs.Type)
		d.tops[i] = top{n.st.Dev, types[i] == unix.OVERLAYFS_SUPER_MAGIC}
	}
	if types == [2]int64{unix.BTRFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC} {
		d.parted = parted(lo.fd, up.fd)
	}
	d.knows = d.tops[0].overlay && d.tops[1].overlay || !d.parted.IsZero()
}

// A handle of overlayfs (ovl_fh in fs/overlayfs/overlayfs.h) names the file of a layer that is behind one of the mount, by the UUID of the
// layer's file system and the handle there, which has the inode's generation.
const (
	overlayHandle = 0xf8  // OVL_FILEID_V1
	handleFID     = 0x200 // AT_HANDLE_FID: a name is enough, nobody opens by it

	handleType, handleUUID, handleFile = 7, 8, 24 // offsets

	inodeGeneration = 1 // FILEID_INO32_GEN: the file is an inode number and its generation, of 4 bytes each
)

func sameOverlayFile(lo, up *node) bool {
	a, b := overlayHandleOf(lo), overlayHandleOf(up)
	return a != nil && bytes.Equal(a, b)
}

// overlayHandleOf returns nil where the kernel tells none (before 6.6), or one that another file system may have too: without a UUID it
// must have the generation, a random number.
func overlayHandleOf(n *node) []byte {
	h, _, err := unix.NameToHandleAt(n.parent, n.name, handleFID)
	if err != nil || h.Type() != overlayHandle {
		return nil
	}
	b := h.Bytes()
	if len(b) <= handleFile {
		return nil
	}
	if bytes.Equal(b[handleUUID:handleFile], make([]byte, handleFile-handleUUID)) &&
		(b[handleType] != inodeGeneration || bytes.Equal(b[handleFile+4:], make([]byte, 4))) {
		return nil
	}
	return b
}

// parted returns the time at which two btrfs subvolumes were still the same, or zero: one is a snapshot of the other, or both are of a
// third. An inode with a change time before that, the same in both, has the same content: who writes to a file can't choose its change
// time.
func parted(lower, upper int) time.Time {
	lo, ok := subvolume(lower)
	up, ok2 := subvolume(upper)
	var none [16]byte
	var t time.Time
	switch {
	case !ok || !ok2:
		return t
	case up.parent != none && up.parent == lo.uuid:
		t = up.made
	case lo.parent != none && lo.parent == up.uuid:
		t = lo.made
	case lo.parent != none && lo.parent == up.parent:
		if t = lo.made; up.made.Before(t) {
			t = up.made
		}
	default:
		return t
	}
	return t.Add(-underWay)
}

// underWay is how long a write may go on to store data after it has set the file's change time.
var underWay = 2 * time.Second

type subvolumeInfo struct {
	uuid, parent [16]byte
	made         time.Time
}

// subvolume asks for the subvolume that an open directory is in.
func subvolume(fd int) (s subvolumeInfo, ok bool) {
	const request = 0x81f8943c // BTRFS_IOC_GET_SUBVOL_INFO, struct btrfs_ioctl_get_subvol_info_args of 504 bytes
	var b [504]byte
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&b))); e != 0 {
		return s, false
	}
	copy(s.uuid[:], b[296:])
	copy(s.parent[:], b[312:])
	s.made = time.Unix(int64(binary.NativeEndian.Uint64(b[392:])), int64(binary.NativeEndian.Uint32(b[400:])))
	return s, true
}
