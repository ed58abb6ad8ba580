package archive

import (
	"errors"
	"unsafe"

	"distkit/disk/sys"

	"golang.org/x/sys/unix"
)

// A dir is a directory below the target that is held open.
type dir struct {
	fd   int
	path string // from the target, no symbolic link in it; "" is the target
	hash uint64 // of the path

	// ours tells that this layer created it, or has hidden what was in it: nothing below it is of lower layers.
	ours bool

	touched bool // the tree's touched holds it

	// What creating files in it does, once probed.
	probed   bool
	mask     uint32 // permission bits that a new file does not get
	uid, gid uint32 // owner of a new file
	setgid   bool   // new directories inherit the set-group-ID bit
	acl      bool   // it has a default ACL, which new files and directories inherit

	// What the directory must have again when it is closed.
	times   *[2]unix.Timespec
	mode    uint32
	setMode bool
}

// mkdir makes the directory name in d, with the mode whatever the umask, in place of what is
// there; or opens it, if it is a directory already.
func (t *tree) mkdir(d *dir, name string, mode uint32, keep ...*dir) (c *dir, made bool, err error) {
	if err := t.check(d, name); err != nil {
		return nil, false, err
	}
	first := mode & 0o777
	if !t.privileged {
		first |= 0o700
	}
	err = sys.Mkdirat(d.fd, name, first)
	replaced := false
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := sys.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, false, err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			c, _, err = t.child(d, name, keep...)
			return c, false, err
		}
		if err := t.remove(d, name); err != nil {
			return nil, false, err
		}
		replaced = true
		err = sys.Mkdirat(d.fd, name, first)
	}
	if err != nil {
		return nil, false, err
	}
	t.wrote(d, name)
	fd, err := openBeneath(d.fd, name)
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	t.probe(d)
	if d.acl {
		if err := dropACLs(fd, accessACL, defaultACL); err != nil {
			return nil, false, err
		}
	}
	if d.setgid || first&^d.mask != first || mode&0o7000 != 0 {
		if err := sys.Fchmod(fd, mode&0o7000|first); err != nil {
			return nil, false, err
		}
	}
	if replaced && t.opaque != "" {
		// What the replaced entry hid of the lower layers must stay hidden.
		if err := t.setOpaque(fd, t.under(d.hash, name)); err != nil {
			return nil, false, err
		}
	}
	if err := t.makeRoom(append(keep, d)...); err != nil {
		return nil, false, err
	}
	c = &dir{fd: fd, path: join(d.path, name), hash: t.under(d.hash, name), ours: true}
	if first != mode&0o777 {
		c.mode, c.setMode = mode, true
	}
	if !d.setgid && mode&unix.S_ISGID == 0 {
		c.probed, c.mask, c.uid, c.gid = true, d.mask, d.uid, d.gid
	}
	t.open[c.hash] = c
	return c, true, nil
}

// probe learns what a file created in d gets, from one that never has a name: umask, default
// ACLs, set-group-ID and mount options all show in it.
func (t *tree) probe(d *dir) {
	if d.probed {
		return
	}
	d.probed, d.setgid = true, true
	d.mask, d.uid, d.gid = 0o777, unchanged, unchanged
	_, err := unix.Fgetxattr(d.fd, defaultACL, nil)
	d.acl = err == nil
	fd, err := sys.Openat(d.fd, ".", unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o777)
	if err != nil {
		return // every file is told its mode and owner
	}
	defer unix.Close(fd)
	var f, st unix.Stat_t
	if sys.Fstat(fd, &f) == nil && sys.Fstat(d.fd, &st) == nil {
		d.mask, d.uid, d.gid = 0o777&^f.Mode, f.Uid, f.Gid
		d.setgid = st.Mode&unix.S_ISGID != 0 || f.Gid != uint32(unix.Getegid())
	}
}

func (d *dir) close() error {
	var err error
	if d.setMode {
		err = sys.Fchmod(d.fd, d.mode)
	}
	if d.times != nil && err == nil {
		if err = futimens(d.fd, d.times); errors.Is(err, unix.EPERM) {
			err = nil // another user's directory, which its owner lets us write to
		}
	}
	_ = unix.Close(d.fd)
	return err
}

func futimens(fd int, times *[2]unix.Timespec) error {
	for {
		_, _, e := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0)
		switch e {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return e
		}
	}
}
