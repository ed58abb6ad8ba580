// Package sys wraps the system calls of golang.org/x/sys/unix on files and mounts. Each is repeated when a signal
// interrupts it (EINTR), as package os does: the Go runtime sends itself signals all the time, and FUSE and NFS return
// EINTR for them. Errors are those of the system calls.
//
// The package also opens, walks and removes trees that may hold anything, since they were made by others: [OpenBeneath]
// opens a path without following symbolic links, [EachName] lists a directory, [Trail] walks a tree, and [RemoveAll]
// removes one.
package sys

import "golang.org/x/sys/unix"

// Calling, if not nil, is called before each system call. Tests use it to count calls.
var Calling func()

func retry(f func() error) error {
	for {
		if Calling != nil {
			Calling()
		}
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}

func Open(path string, flags int, perm uint32) (n int, err error) {
	err = retry(func() error { n, err = unix.Open(path, flags, perm); return err })
	return n, err
}

func Openat(dir int, path string, flags int, perm uint32) (n int, err error) {
	err = retry(func() error { n, err = unix.Openat(dir, path, flags, perm); return err })
	return n, err
}

func Read(fd int, p []byte) (n int, err error) {
	err = retry(func() error { n, err = unix.Read(fd, p); return err })
	return n, err
}

func Fstat(fd int, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstat(fd, st) })
}

func Fstatat(dir int, path string, st *unix.Stat_t, flags int) error {
	return retry(func() error { return unix.Fstatat(dir, path, st, flags) })
}

func Fchmod(fd int, mode uint32) error {
	return retry(func() error { return unix.Fchmod(fd, mode) })
}

func Fchmodat(dir int, path string, mode uint32, flags int) error {
	return retry(func() error { return unix.Fchmodat(dir, path, mode, flags) })
}

func Fchown(fd, uid, gid int) error {
	return retry(func() error { return unix.Fchown(fd, uid, gid) })
}

func Fchownat(dir int, path string, uid, gid, flags int) error {
	return retry(func() error { return unix.Fchownat(dir, path, uid, gid, flags) })
}

func Mkdirat(dir int, path string, mode uint32) error {
	return retry(func() error { return unix.Mkdirat(dir, path, mode) })
}

func Mknodat(dir int, path string, mode uint32, dev int) error {
	return retry(func() error { return unix.Mknodat(dir, path, mode, dev) })
}

func Symlinkat(target string, dir int, path string) error {
	return retry(func() error { return unix.Symlinkat(target, dir, path) })
}

func Linkat(olddir int, oldpath string, newdir int, newpath string, flags int) error {
	return retry(func() error { return unix.Linkat(olddir, oldpath, newdir, newpath, flags) })
}

func Unlinkat(dir int, path string, flags int) error {
	return retry(func() error { return unix.Unlinkat(dir, path, flags) })
}

func Renameat(olddir int, oldpath string, newdir int, newpath string) error {
	return retry(func() error { return unix.Renameat(olddir, oldpath, newdir, newpath) })
}

func Readlinkat(dir int, path string, buf []byte) (n int, err error) {
	err = retry(func() error { n, err = unix.Readlinkat(dir, path, buf); return err })
	return n, err
}

func UtimesNanoAt(dir int, path string, ts []unix.Timespec, flags int) error {
	return retry(func() error { return unix.UtimesNanoAt(dir, path, ts, flags) })
}

func Ftruncate(fd int, size int64) error {
	return retry(func() error { return unix.Ftruncate(fd, size) })
}

func Fsetxattr(fd int, name string, value []byte, flags int) error {
	return retry(func() error { return unix.Fsetxattr(fd, name, value, flags) })
}

func Lsetxattr(path, name string, value []byte, flags int) error {
	return retry(func() error { return unix.Lsetxattr(path, name, value, flags) })
}

func Syncfs(fd int) error {
	return retry(func() error { return unix.Syncfs(fd) })
}

func Mount(source, target, fstype string, flags uintptr, data string) error {
	return retry(func() error { return unix.Mount(source, target, fstype, flags, data) })
}

func Unmount(target string, flags int) error {
	return retry(func() error { return unix.Unmount(target, flags) })
}

func MoveMount(from int, frompath string, to int, topath string, flags int) error {
	return retry(func() error { return unix.MoveMount(from, frompath, to, topath, flags) })
}

func OpenTree(dir int, path string, flags uint) (n int, err error) {
	err = retry(func() error { n, err = unix.OpenTree(dir, path, flags); return err })
	return n, err
}

func MountSetattr(dir int, path string, flags uint, attr *unix.MountAttr) error {
	return retry(func() error { return unix.MountSetattr(dir, path, flags, attr) })
}

func Fsopen(fstype string, flags int) (n int, err error) {
	err = retry(func() error { n, err = unix.Fsopen(fstype, flags); return err })
	return n, err
}

func FsconfigSetString(fd int, key, value string) error {
	return retry(func() error { return unix.FsconfigSetString(fd, key, value) })
}

func FsconfigSetFlag(fd int, key string) error {
	return retry(func() error { return unix.FsconfigSetFlag(fd, key) })
}

func FsconfigCreate(fd int) error {
	return retry(func() error { return unix.FsconfigCreate(fd) })
}

func Fsmount(fd, flags, attributes int) (n int, err error) {
	err = retry(func() error { n, err = unix.Fsmount(fd, flags, attributes); return err })
	return n, err
}
