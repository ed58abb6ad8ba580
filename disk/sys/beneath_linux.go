package sys

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// NoOpenat2 is set once the kernel (before 5.6), or a filter of system calls in front of it, is seen to lack openat2(2). Tests set it
// to try what is done then.
var NoOpenat2 atomic.Bool

// OpenDir are the flags that open a directory itself, not one that a symbolic link leads to.
const OpenDir = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// OpenBeneath opens a relative path below the directory dir. It follows no symbolic link: ELOOP or ENOTDIR. resolve may be
// RESOLVE_NO_XDEV, by which a path that leads into another mount is EXDEV.
func OpenBeneath(dir int, path string, flags int, resolve uint64) (int, error) {
	if !NoOpenat2.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | resolve,
		}
		fd, err := -1, unix.EAGAIN
		for err == unix.EAGAIN { // something was renamed meanwhile
			e := retry(func() (err error) { fd, err = unix.Openat2(dir, path, &how); return err })
			if e == nil {
				return fd, nil
			}
			err = e.(unix.Errno)
		}
		if err != unix.ENOSYS && err != unix.EPERM {
			return -1, err
		}
		NoOpenat2.Store(true)
	}
	return openEach(dir, path, flags, resolve)
}

// openEach is OpenBeneath without openat2, component by component.
func openEach(dir int, path string, flags int, resolve uint64) (int, error) {
	at := dir
	for {
		name, rest, more := strings.Cut(path, "/")
		how := flags | unix.O_NOFOLLOW
		if more {
			how = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		}
		fd, err := -1, error(unix.EXDEV)
		if name != ".." {
			fd, err = Openat(at, name, how, 0)
		}
		if at != dir {
			_ = unix.Close(at)
		}
		if err == nil && resolve&unix.RESOLVE_NO_XDEV != 0 && !sameMount(fd, dir) {
			_ = unix.Close(fd)
			err = unix.EXDEV
		}
		if err != nil {
			return -1, err
		}
		if !more {
			return fd, nil
		}
		at, path = fd, rest
	}
}

// sameMount reports whether two open files are in one mount. If that can't be told they are not.
func sameMount(a, b int) bool {
	id := mountOf(a)
	return id != "" && id == mountOf(b)
}

// mountOf is the ID of the mount that an open file is in, "" if it can't be told.
func mountOf(fd int) string {
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return ""
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if id, ok := strings.CutPrefix(lines.Text(), "mnt_id:"); ok {
			return strings.TrimSpace(id)
		}
	}
	return ""
}

// EachName calls f for each name in an open directory, from the first on. It holds a few names at a time, and f may remove them. A
// directory that was removed meanwhile has none.
func EachName(fd int, f func(name string) error) error {
	if err := retry(func() error { _, err := unix.Seek(fd, 0, 0); return err }); err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	names := make([]string, 0, 256)
	for {
		var err error
		if names, err = readNames(fd, buf, names[:0]); err != nil || len(names) == 0 {
			return err
		}
		for _, name := range names {
			if err := f(name); err != nil {
				return err
			}
		}
	}
}

// readNames adds the next names of an open directory to a list: none at its end.
func readNames(fd int, buf []byte, names []string) ([]string, error) {
	for {
		n := 0
		err := retry(func() (err error) { n, err = unix.Getdents(fd, buf); return err })
		if err == unix.ENOENT { // the directory was removed
			n, err = 0, nil
		}
		for b := buf[:max(n, 0)]; len(b) > 0; {
			var used int
			used, _, names = unix.ParseDirent(b, -1, names)
			b = b[used:]
		}
		if err != nil || n == 0 || len(names) > 0 {
			return names, err
		}
	}
}

// Names lists an open directory.
func Names(fd int) (names []string, err error) {
	err = EachName(fd, func(name string) error {
		names = append(names, name)
		return nil
	})
	return names, err
}

// ErrMounted is why something is not removed: it is, or holds, what another file system is mounted on.
var ErrMounted = errors.New("something is mounted there")

// RemoveAll removes name in the directory dir with all that is below it, whatever the modes of the directories. It is nil if there is
// nothing of that name. It removes nothing of other mounts: ErrMounted, or EBUSY.
//
// ENOTEMPTY if others add to the tree meanwhile, or on NFS have a file of it open. The work grows with the number of files. Memory and the number of open files do not: a tree can be as deep as a disk is large.
func RemoveAll(dir int, name string) error {
	r := remover{top: -1, aside: -1}
	defer r.closeAside()
	return r.remove(dir, name, 0)
}

// maxPasses is how often a directory is emptied that others may write to. On NFS a file that another process has open gets a new name
// when it is removed, each time.
const maxPasses = 2

// maxDepth is how many levels of directories RemoveAll holds open.
const maxDepth = 64

// A remover removes a tree. It moves a directory at its depth limit that is not empty into a new directory in the top one, and
// removes what is there in the next pass.
type remover struct {
	top, aside int    // descriptors, -1 before there is one
	name       string // of aside
	n          int    // names given
}

func (r *remover) closeAside() {
	if r.aside >= 0 {
		_ = unix.Close(r.aside)
	}
	r.aside = -1
}

func (r *remover) remove(dir int, name string, depth int) error {
	err := r.unlinkBelow(dir, name, 0, depth)
	switch err {
	case nil, unix.ENOENT:
		return nil
	case unix.EISDIR, unix.EPERM, unix.EACCES:
	default:
		return fmt.Errorf("remove %q: %w", name, err)
	}
	fd, oerr := OpenBeneath(dir, name, OpenDir, unix.RESOLVE_NO_XDEV)
	if oerr == unix.EACCES {
		fd, oerr = OpenForbidden(dir, name, unix.RESOLVE_NO_XDEV)
	}
	switch oerr {
	case nil:
	case unix.ENOENT:
		return nil
	case unix.ENOTDIR, unix.ELOOP:
		return fmt.Errorf("remove %q: %w", name, err)
	case unix.EXDEV:
		return fmt.Errorf("remove %q: %w", name, ErrMounted)
	default:
		return fmt.Errorf("open %q: %w", name, oerr)
	}
	defer unix.Close(fd)
	if depth == 0 {
		r.top = fd
	}
	for pass, n := 0, r.n; ; pass++ {
		err := r.unlinkBelow(dir, name, unix.AT_REMOVEDIR, depth)
		switch {
		case err == nil, err == unix.ENOENT:
			return nil
		case err != unix.ENOTEMPTY && err != unix.EEXIST, pass == maxPasses:
			return fmt.Errorf("remove %q: %w", name, err)
		}
		if r.n > n && depth == 0 {
			pass, n = 0, r.n // what the last pass has moved here was not there before
		}
		if depth == maxDepth {
			_ = Fchmod(fd, 0o700) // a directory is moved only by who may write to it
			return r.setAside(dir, name)
		}
		if depth == 0 {
			r.closeAside() // of the last pass, which is now one of the names to remove
		}
		if err := r.empty(fd, depth); err != nil {
			return err
		}
	}
}

// unlink is unlinkat(2). A file that was made immutable or append-only, or whose directory was, is made neither first, which
// root can.
func unlink(dir int, name string, flags int) error {
	err := Unlinkat(dir, name, flags)
	if err != unix.EPERM {
		return err
	}
	changed := changeable(dir)
	var st unix.Stat_t
	if Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && (st.Mode&unix.S_IFMT == unix.S_IFREG || st.Mode&unix.S_IFMT == unix.S_IFDIR) {
		fd, oerr := OpenBeneath(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, unix.RESOLVE_NO_XDEV)
		if oerr == nil {
			changed = changeable(fd) || changed
			_ = unix.Close(fd)
		}
	}
	if changed {
		err = Unlinkat(dir, name, flags)
	}
	return err
}

// changeable takes the flags from a file that keep it from being changed, and reports whether it had any.
func changeable(fd int) bool {
	const fixed = 0x10 | 0x20 // FS_IMMUTABLE_FL and FS_APPEND_FL of linux/fs.h
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	return err == nil && flags&fixed != 0 && unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags&^fixed) == nil
}

// empty removes, or moves away, what an open directory holds.
func (r *remover) empty(fd, depth int) error {
	return EachName(fd, func(name string) error {
		if depth == 0 && r.aside >= 0 && name == r.name {
			return nil // the next pass removes it
		}
		return r.remove(fd, name, depth+1)
	})
}

// unlinkBelow is unlink in a directory of the tree, which its owner may have to be let into first.
func (r *remover) unlinkBelow(dir int, name string, flags, depth int) error {
	err := unlink(dir, name, flags)
	if err == unix.EACCES && depth > 0 && Fchmod(dir, 0o700) == nil {
		err = unlink(dir, name, flags)
	}
	return err
}

func (r *remover) setAside(dir int, name string) error {
	for r.aside < 0 {
		_ = Fchmod(r.top, 0o700)
		r.n++
		r.name = strconv.Itoa(r.n)
		err := Mkdirat(r.top, r.name, 0o700)
		if err == unix.EEXIST {
			continue
		}
		if err == nil {
			r.aside, err = OpenBeneath(r.top, r.name, OpenDir, unix.RESOLVE_NO_XDEV)
		}
		if err != nil {
			return fmt.Errorf("make a directory for deep ones: %w", err)
		}
	}
	r.n++
	if err := Renameat(dir, name, r.aside, strconv.Itoa(r.n)); err != nil {
		return fmt.Errorf("move %q: %w", name, err)
	}
	return nil
}

// OpenForbidden opens a directory whose mode keeps its owner out: it lets the owner in for as long as that takes. EACCES if this
// process is not the owner. resolve is as for [OpenBeneath].
func OpenForbidden(dir int, name string, resolve uint64) (int, error) {
	p, err := OpenBeneath(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, resolve)
	if err != nil {
		return -1, err
	}
	defer unix.Close(p)
	var st unix.Stat_t
	if err := Fstat(p, &st); err != nil {
		return -1, err
	}
	self := "/proc/self/fd/" + strconv.Itoa(p)
	if unix.Chmod(self, st.Mode&0o7777|0o700) != nil {
		return -1, unix.EACCES
	}
	fd, err := OpenBeneath(dir, name, OpenDir, resolve)
	_ = unix.Chmod(self, st.Mode&0o7777)
	return fd, err
}

// Grow calls f, which fills a buffer and gives the number of bytes, with one that is large enough: for extended attributes.
func Grow(f func(buf []byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 16 {
		buf := make([]byte, size)
		n := 0
		err := retry(func() (err error) { n, err = f(buf); return err })
		if err == nil {
			return buf[:n], nil
		}
		if err != unix.ERANGE || size > 64<<10 {
			return nil, err
		}
	}
}
