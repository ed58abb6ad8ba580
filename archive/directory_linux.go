package archive

import (
	"errors"
	"unsafe"

	"distkit/disk/sys"

	"golang.org/x/sys/unix"
)

// A dir is an open directory in the target.
type dir struct {
	fd   int
	path string // relative to the target, without symbolic links; "" is the target itself
	hash uint64 // of path

	// ours is true if this layer created the directory or hid its content: nothing in it belongs to lower layers.
	ours bool

	touched bool // tree.touched has it

	// How new files in it are created. Valid if probed is true.
	probed   bool
	mask     uint32 // permission bits that a new file doesn't get
	uid, gid uint32 // owner of a new file
	setgid   bool   // new directories inherit the set-group-ID bit
	acl      bool   // has a default ACL, which new files and directories inherit

	// To be restored when the directory is closed.
	times   *[2]unix.Timespec
	mode    uint32
	setMode bool
}

// mkdir creates the directory name in d with the given mode, whatever the umask. It replaces whatever is there, but
// opens a directory that exists. made reports whether it was created.
func (t *tree) mkdir(d *dir, name string, mode uint32, keep ...*dir) (c *dir, made bool, err error) {
	if err := t.check(d, name); err != nil {
		return nil, false, err
	}
	initial := mode & 0o777
	if !t.privileged {
		initial |= 0o700
	}
	err = sys.Mkdirat(d.fd, name, initial)
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
		err = sys.Mkdirat(d.fd, name, initial)
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
	if d.setgid || initial&^d.mask != initial || mode&0o7000 != 0 {
		if err := sys.Fchmod(fd, mode&0o7000|initial); err != nil {
			return nil, false, err
		}
	}
	if replaced && t.opaque != "" {
		// What the replaced entry hid must stay hidden.
		if err := t.setOpaque(fd, t.under(d.hash, name)); err != nil {
			return nil, false, err
		}
	}
	if err := t.makeRoom(append(keep, d)...); err != nil {
		return nil, false, err
	}
	c = &dir{fd: fd, path: join(d.path, name), hash: t.under(d.hash, name), ours: true}
	if initial != mode&0o777 {
		c.mode, c.setMode = mode, true
	}
	if !d.setgid && mode&unix.S_ISGID == 0 {
		c.probed, c.mask, c.uid, c.gid = true, d.mask, d.uid, d.gid
	}
	t.open[c.hash] = c
	return c, true, nil
}

// probe finds out how new files in d are created, by creating one without a name: it shows the effect of umask, default
// ACLs, set-group-ID and mount options.
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
		return // set mode and owner explicitly for each file
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
			err = nil // another user's directory, to which this user may write
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
