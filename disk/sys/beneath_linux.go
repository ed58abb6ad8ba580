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

// NoOpenat2 is set after the first failure that shows that the kernel (before 5.6), or a filter of system calls, lacks
// openat2(2). Tests set it to exercise the fallback.
var NoOpenat2 atomic.Bool

// OpenDir are the flags to open a directory; a symbolic link is not followed.
const OpenDir = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// OpenBeneath opens a relative path below the directory dir, and follows no symbolic link: ELOOP or ENOTDIR. With
// resolve unix.RESOLVE_NO_XDEV a path that leads into another mount fails with EXDEV.
func OpenBeneath(dir int, path string, flags int, resolve uint64) (int, error) {
	if !NoOpenat2.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | resolve,
		}
		fd, err := -1, unix.EAGAIN
		for err == unix.EAGAIN { // EAGAIN: a path component was renamed during the call
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

// openEach is OpenBeneath without openat2(2): it opens one component at a time.
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

// sameMount reports whether two open files are in the same mount. It is false if that is unknown.
func sameMount(a, b int) bool {
	id := mountOf(a)
	return id != "" && id == mountOf(b)
}

// mountOf returns the ID of the mount that an open file is in, or "" if it is unknown.
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

// EachName calls f for each name in an open directory, beginning at the first. It holds a few names in memory at a
// time, and f may remove them. A directory that another process removes in the meantime has no more names.
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

// readNames appends the next names of an open directory to a list. It appends nothing at the directory's end.
func readNames(fd int, buf []byte, names []string) ([]string, error) {
	for {
		n := 0
		err := retry(func() (err error) { n, err = unix.Getdents(fd, buf); return err })
		if err == unix.ENOENT { // another process removed the directory
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

// Names returns all names in an open directory.
func Names(fd int) (names []string, err error) {
	err = EachName(fd, func(name string) error {
		names = append(names, name)
		return nil
	})
	return names, err
}

// ErrMounted is the error of [RemoveAll] and [Trail] for a directory on which another file system is mounted.
var ErrMounted = errors.New("something is mounted there")

// RemoveAll removes name in the directory dir and everything below it, whatever the modes of the directories. A name
// that doesn't exist is no error. RemoveAll enters no other mount: ErrMounted, or EBUSY.
//
// It fails with ENOTEMPTY if other processes add files at the same time, or have a file open on NFS. Time grows with
// the number of files; memory and the number of open files are bounded, however deep the tree is.
func RemoveAll(dir int, name string) error {
	r := remover{top: -1, moved: -1}
	defer r.closeMoved()
	return r.remove(dir, name, 0)
}

// maxPasses is how often a directory is emptied again because it isn't empty after a pass. Other processes may add
// files, and NFS renames a file that is removed while it is open.
const maxPasses = 2

// maxDepth is how many levels of directories are open at most.
const maxDepth = 64

// A remover removes a tree with a bounded number of open directories. It moves each non-empty directory at maxDepth
// into a new directory at the top, and empties that in the next pass.
type remover struct {
	top       int    // the descriptor of the top directory; -1 until it is open
	moved     int    // the descriptor of the directory that deep directories are moved to; -1 if there is none
	movedName string // the name of that directory in top
	n         int    // the last number that was used as a name
}

func (r *remover) closeMoved() {
	if r.moved >= 0 {
		_ = unix.Close(r.moved)
	}
	r.moved = -1
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
			pass, n = 0, r.n // start to count anew: the last pass moved directories to the top, so it isn't empty
		}
		if depth == maxDepth {
			_ = Fchmod(fd, 0o700) // renaming a directory needs the permission to write to it
			return r.moveUp(dir, name)
		}
		if depth == 0 {
			r.closeMoved() // the last pass's: it is now one of the names to remove
		}
		if err := r.empty(fd, depth); err != nil {
			return err
		}
	}
}

// unlink is unlinkat(2). If that is refused with EPERM, it clears the attributes immutable and append-only of the file
// and of its directory, which root may do, and tries again.
func unlink(dir int, name string, flags int) error {
	err := Unlinkat(dir, name, flags)
	if err != unix.EPERM {
		return err
	}
	changed := clearImmutable(dir)
	var st unix.Stat_t
	if Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && (st.Mode&unix.S_IFMT == unix.S_IFREG || st.Mode&unix.S_IFMT == unix.S_IFDIR) {
		fd, oerr := OpenBeneath(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, unix.RESOLVE_NO_XDEV)
		if oerr == nil {
			changed = clearImmutable(fd) || changed
			_ = unix.Close(fd)
		}
	}
	if changed {
		err = Unlinkat(dir, name, flags)
	}
	return err
}

// clearImmutable clears the attributes immutable and append-only of a file, and reports whether it had one of them.
func clearImmutable(fd int) bool {
	const fixed = 0x10 | 0x20 // FS_IMMUTABLE_FL and FS_APPEND_FL of linux/fs.h
	flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
	return err == nil && flags&fixed != 0 && unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags&^fixed) == nil
}

// empty removes each entry of an open directory, or moves it to the top.
func (r *remover) empty(fd, depth int) error {
	return EachName(fd, func(name string) error {
		if depth == 0 && r.moved >= 0 && name == r.movedName {
			return nil // in the next pass
		}
		return r.remove(fd, name, depth+1)
	})
}

// unlinkBelow is unlink in a directory of the tree. If the directory's mode keeps its owner out, it changes the mode
// first.
func (r *remover) unlinkBelow(dir int, name string, flags, depth int) error {
	err := unlink(dir, name, flags)
	if err == unix.EACCES && depth > 0 && Fchmod(dir, 0o700) == nil {
		err = unlink(dir, name, flags)
	}
	return err
}

func (r *remover) moveUp(dir int, name string) error {
	for r.moved < 0 {
		_ = Fchmod(r.top, 0o700)
		r.n++
		r.movedName = strconv.Itoa(r.n)
		err := Mkdirat(r.top, r.movedName, 0o700)
		if err == unix.EEXIST {
			continue
		}
		if err == nil {
			r.moved, err = OpenBeneath(r.top, r.movedName, OpenDir, unix.RESOLVE_NO_XDEV)
		}
		if err != nil {
			return fmt.Errorf("make a directory to move deep directories to: %w", err)
		}
	}
	r.n++
	if err := Renameat(dir, name, r.moved, strconv.Itoa(r.n)); err != nil {
		return fmt.Errorf("move %q: %w", name, err)
	}
	return nil
}

// OpenForbidden opens a directory whose mode keeps its owner out: it changes the mode, opens the directory, and
// restores the mode. EACCES if this process is not the owner. resolve is as for [OpenBeneath].
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

// Grow calls f with ever larger buffers, of at most 1 MiB, until f doesn't fail with ERANGE. f fills the buffer and
// returns the number of bytes. It is for calls that read extended attributes.
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
