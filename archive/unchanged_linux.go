package archive

import (
	"bytes"
	"encoding/binary"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unchanged reports whether two files are known to be equal without reading them: either both are the same inode of a
// layer, seen through two overlayfs mounts, or the inode has not changed since one btrfs snapshot was made of the
// other.
func (d *differ) unchanged(lo, up *node) bool {
	a, b := &lo.st, &up.st
	if a.Ino != b.Ino || a.Ctim != b.Ctim || a.Mtim != b.Mtim || a.Size != b.Size || a.Mode != b.Mode || up.isDir() {
		return false
	}
	if d.tops[0].overlay && d.tops[1].overlay {
		return a.Dev == d.tops[0].dev && b.Dev == d.tops[1].dev && sameOverlayFile(lo, up)
	}
	return !d.diverged.IsZero() && a.Dev == d.tops[0].dev && b.Dev == d.tops[1].dev && time.Unix(a.Ctim.Unix()).Before(d.diverged)
}

// A top holds the file system properties of a tree.
type top struct {
	dev     uint64
	overlay bool
}

// findIdentity finds out how files of the two trees can be known to be unchanged.
func (d *differ) findIdentity(lo, up *node) {
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
		d.diverged = divergedAt(lo.fd, up.fd)
	}
	d.identity = d.tops[0].overlay && d.tops[1].overlay || !d.diverged.IsZero()
}

// A file handle of overlayfs (ovl_fh in fs/overlayfs/overlayfs.h) identifies the file of a layer behind a file of the
// mount: by the UUID of the layer's file system, and that file system's handle, which includes the inode's generation.
const (
	overlayHandle = 0xf8  // OVL_FILEID_V1
	handleFID     = 0x200 // AT_HANDLE_FID: the handle only identifies the file, and can't be opened

	handleType, handleUUID, handleFile = 7, 8, 24 // offsets in the handle

	inodeGeneration = 1 // FILEID_INO32_GEN: an inode number and its generation, of 4 bytes each
)

func sameOverlayFile(lo, up *node) bool {
	a, b := overlayHandleOf(lo), overlayHandleOf(up)
	return a != nil && bytes.Equal(a, b)
}

// overlayHandleOf returns the handle of a node, or nil if the kernel has none (before 6.6) or if it could be another
// file system's too. A handle without a UUID must have a generation, which is a random number.
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

// divergedAt returns a time at which two btrfs subvolumes were still equal: one is a snapshot of the other, or both are
// of a third. It is zero if they are unrelated. An inode that both have with the same change time before that has the
// same content in both, because no user can choose a change time.
func divergedAt(lower, upper int) time.Time {
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
	return t.Add(-writeDelay)
}

// writeDelay is how long a write may go on storing data after it has set the file's change time.
var writeDelay = 2 * time.Second

type subvolumeInfo struct {
	uuid, parent [16]byte
	made         time.Time
}

// subvolume returns the btrfs subvolume that an open directory is in.
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
