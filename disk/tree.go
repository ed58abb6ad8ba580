package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Tree is a directory with untrusted content, such as a store. Its own path is trusted. A name below it is resolved one
// component at a time, and a symbolic link on the way is an error. So is a last component of an unexpected kind: Tree
// never waits for a FIFO, a device or a socket.
//
// Names are relative to the directory, with slashes; "." is the directory itself. Errors are *fs.PathError. A file that
// is refused because of its kind or size is FailedPrecondition.
type Tree string

// Path returns the path of a name, for messages and for programs that take a path.
func (t Tree) Path(name string) string { return filepath.Join(string(t), name) }

// refused is the error for a file of an unexpected kind or size.
type refused string

func (r refused) Error() string      { return string(r) }
func (refused) Is(target error) bool { return target == errdefs.ErrFailedPrecondition }

const (
	errLink    = refused("is a symbolic link, which is not followed")
	errRegular = refused("is not a regular file")
	errDir     = refused("is not a directory")
)

const openFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func openat(dir int, name string, flag int, perm fs.FileMode) (fd int, err error) {
	err = retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flag|openFlags, uint32(perm.Perm()))
		return err
	})
	return fd, err
}

func (t Tree) failed(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: t.Path(name), Err: err}
}

// openDir opens the directory of a clean relative path: in one system call, or if that fails component by component.
func (t Tree) openDir(name string) (dir int, err error) {
	err = retry(func() (err error) {
		dir, err = unix.Open(string(t), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil || name == "." {
		return dir, err
	}
	if strings.Contains(name, "/") {
		if fd, ok := openBeneath(dir, name); ok {
			_ = unix.Close(dir)
			return fd, nil
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		next, err := openat(dir, part, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
			err = kindOf(dir, part, errDir)
		}
		_ = unix.Close(dir)
		if err != nil {
			return -1, err
		}
		dir = next
	}
	return dir, nil
}

// kindOf returns errLink if name is a symbolic link, and otherwise err.
func kindOf(dir int, name string, err error) error {
	var st unix.Stat_t
	if statAt(dir, name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return errLink
	}
	return err
}

func statAt(dir int, name string, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

// inParent opens the directory of a name, and calls f with it and the name's last component.
func (t Tree) inParent(op, name string, f func(dir int, base string) error) error {
	clean := filepath.Clean(name)
	if !filepath.IsLocal(clean) || clean == "." {
		return t.failed(op, name, unix.EINVAL)
	}
	dir, err := t.openDir(filepath.Dir(clean))
	if err == nil {
		err = f(dir, filepath.Base(clean))
		_ = unix.Close(dir)
	}
	return t.failed(op, name, err)
}

// OpenDir opens a directory.
func (t Tree) OpenDir(name string) (*os.File, error) {
	clean := filepath.Clean(name)
	if !filepath.IsLocal(clean) {
		return nil, t.failed("open", name, unix.EINVAL)
	}
	dir, err := t.openDir(clean)
	if err != nil {
		return nil, t.failed("open", name, err)
	}
	return os.NewFile(uintptr(dir), t.Path(name)), nil
}

// Open opens a regular file for reading.
func (t Tree) Open(name string) (*os.File, error) { return t.OpenFile(name, os.O_RDONLY, 0) }

// OpenFile opens a regular file. With os.O_CREATE it creates the file if it doesn't exist.
func (t Tree) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	var st unix.Stat_t
	fd, err := t.open(name, flag, perm, &st)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), t.Path(name)), nil
}

// open is OpenFile for a descriptor. It stores the attributes of the open file in st.
func (t Tree) open(name string, flag int, perm fs.FileMode, st *unix.Stat_t) (fd int, err error) {
	err = t.inParent("open", name, func(dir int, base string) error {
		// Opening a device can have effects, so the kind is checked before.
		err := statAt(dir, base, st)
		if err == nil {
			err = regular(st)
		}
		if err != nil && (flag&os.O_CREATE == 0 || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		fd, err = openat(dir, base, flag, perm)
		if errors.Is(err, unix.ELOOP) {
			return errLink
		}
		if err != nil {
			return err
		}
		err = retry(func() error { return unix.Fstat(fd, st) })
		if err == nil {
			err = regular(st)
		}
		if err != nil {
			_ = unix.Close(fd)
		}
		return err
	})
	return fd, err
}

func regular(st *unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return nil
	case unix.S_IFLNK:
		return errLink
	}
	return errRegular
}

// ReadFile returns the content of a regular file. A file of more than limit bytes is FailedPrecondition, and is not
// read.
func (t Tree) ReadFile(name string, limit int64) ([]byte, error) {
	f, err := t.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := ReadAll(f, limit)
	return b, t.failed("read", name, err)
}

// ReadAll reads an open regular file from its current offset to its end. A file of more than limit bytes is
// FailedPrecondition.
func ReadAll(f *os.File, limit int64) ([]byte, error) {
	large := refused(fmt.Sprintf("is larger than %d bytes", limit))
	fi, err := f.Stat()
	if err != nil {
		return nil, Cause(err)
	}
	if fi.Size() > limit {
		return nil, large
	}
	b := make([]byte, 0, fi.Size()+1)
	inLargePages(b)
	for {
		n, err := f.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		switch {
		case int64(len(b)) > limit:
			return nil, large
		case err == io.EOF:
			return b, nil
		case err != nil:
			return nil, Cause(err)
		}
		if len(b) == cap(b) { // the file has grown since Stat
			b = append(b, 0)[:len(b)]
		}
	}
}

// Unwritable reports whether an operation failed because this user may not write there, or because the mount is
// read-only.
func Unwritable(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)
}

// Cause returns the error inside an *fs.PathError or *os.LinkError, for a message that already names the file.
func Cause(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	var le *os.LinkError
	if errors.As(err, &le) {
		return le.Err
	}
	return err
}

// WriteFile replaces the content of a file in place. It creates the file if it doesn't exist.
func (t Tree) WriteFile(name string, b []byte, perm fs.FileMode) error {
	f, err := t.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Create writes a new file. If durable is set, its content is on disk when Create returns. fs.ErrExist if the name is
// taken.
func (t Tree) Create(name string, b []byte, perm fs.FileMode, durable bool) error {
	return t.CreateBy(name, perm, durable, writeBytes(b))
}

func writeBytes(b []byte) func(*os.File) error {
	return func(f *os.File) error {
		_, err := f.Write(b)
		return err
	}
}

// CreateBy is [Tree.Create] with a function that writes the content. If it fails with another error than fs.ErrExist, a
// part of the file may be left.
func (t Tree) CreateBy(name string, perm fs.FileMode, durable bool, write func(*os.File) error) error {
	f, err := t.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil && durable {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Stat describes a file. It describes a symbolic link itself.
func (t Tree) Stat(name string) (fs.FileInfo, error) {
	info := &fileInfo{name: filepath.Base(name)}
	err := t.inParent("stat", name, func(dir int, base string) error { return statAt(dir, base, &info.st) })
	if err != nil {
		return nil, err
	}
	return info, nil
}

// StatAt is [Tree.Stat] for a name in an open directory, such as one that [Tree.OpenDir] returned.
func StatAt(dir *os.File, name string) (fs.FileInfo, error) {
	info := &fileInfo{name: name}
	if err := statAt(int(dir.Fd()), name, &info.st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: filepath.Join(dir.Name(), name), Err: err}
	}
	return info, nil
}

type fileInfo struct {
	name string
	st   unix.Stat_t
}

func (i *fileInfo) Name() string       { return i.name }
func (i *fileInfo) Size() int64        { return i.st.Size }
func (i *fileInfo) IsDir() bool        { return i.Mode().IsDir() }
func (i *fileInfo) ModTime() time.Time { return time.Unix(i.st.Mtim.Unix()) }
func (i *fileInfo) Sys() any           { return &i.st }

func (i *fileInfo) Mode() fs.FileMode {
	mode := fs.FileMode(i.st.Mode & 0o777)
	switch i.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	default:
		mode |= fs.ModeDevice
	}
	return mode
}

// Remove removes a file. It removes a symbolic link itself.
func (t Tree) Remove(name string) error { return t.remove(name, 0) }

// RemoveDir removes an empty directory.
func (t Tree) RemoveDir(name string) error { return t.remove(name, unix.AT_REMOVEDIR) }

func (t Tree) remove(name string, flag int) error {
	return t.inParent("remove", name, func(dir int, base string) error {
		return retry(func() error { return unix.Unlinkat(dir, base, flag) })
	})
}

// Rename renames a file or directory within the tree.
func (t Tree) Rename(from, to string) error {
	return t.inParents("rename", from, to, func(fromDir int, from string, toDir int, to string) error {
		return unix.Renameat(fromDir, from, toDir, to)
	})
}

// RenameNew is Rename, but fails with fs.ErrExist if the new name is taken. EINVAL, ENOSYS or ENOTSUP if the file
// system can't do that.
func (t Tree) RenameNew(from, to string) error { return t.inParents("rename", from, to, renameNew) }

// Link gives a file a second name, which must not exist.
func (t Tree) Link(from, to string) error {
	return t.inParents("link", from, to, func(fromDir int, from string, toDir int, to string) error {
		return unix.Linkat(fromDir, from, toDir, to, 0)
	})
}

// LinkFile gives an open file a second name, which must not exist. It needs /proc, and fails across mounts (EXDEV).
func (t Tree) LinkFile(f *os.File, to string) error {
	return t.inParent("link", to, func(dir int, base string) error {
		return unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())), dir, base, unix.AT_SYMLINK_FOLLOW)
	})
}

func (t Tree) inParents(op, from, to string, f func(fromDir int, from string, toDir int, to string) error) error {
	var inner error // separate, since it already names the file to
	err := t.inParent(op, from, func(fromDir int, fromBase string) error {
		inner = t.inParent(op, to, func(toDir int, toBase string) error {
			return retry(func() error { return f(fromDir, fromBase, toDir, toBase) })
		})
		return nil
	})
	return errors.Join(err, inner)
}

// Symlink makes a symbolic link with the text target.
func (t Tree) Symlink(target, name string) error {
	return t.inParent("symlink", name, func(dir int, base string) error {
		return retry(func() error { return unix.Symlinkat(target, dir, base) })
	})
}

// Readlink returns the text of a symbolic link.
func (t Tree) Readlink(name string) (target string, err error) {
	b := make([]byte, unix.PathMax)
	err = t.inParent("readlink", name, func(dir int, base string) error {
		return retry(func() error {
			n, err := unix.Readlinkat(dir, base, b)
			target = string(b[:max(n, 0)])
			return err
		})
	})
	return target, err
}

// RemoveAll removes a file, or a directory and everything below it. A name that doesn't exist is no error.
func (t Tree) RemoveAll(name string) error {
	return t.inParent("remove", name, removeAll)
}

// Chtimes sets the times of a file. It sets those of a symbolic link itself.
func (t Tree) Chtimes(name string, at time.Time) error {
	ts := unix.NsecToTimespec(at.UnixNano())
	return t.inParent("chtimes", name, func(dir int, base string) error {
		return retry(func() error {
			return unix.UtimesNanoAt(dir, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
		})
	})
}

// Touch is Chtimes for a file that was just written. On file systems that can't set times (some FUSE ones: EPERM,
// ENOSYS) it returns nil: the file has the time of the write.
func (t Tree) Touch(name string, at time.Time) error {
	err := t.Chtimes(name, at)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// Mkdir creates a directory with mode perm less the umask.
func (t Tree) Mkdir(name string, perm fs.FileMode) error {
	return t.inParent("mkdir", name, func(dir int, base string) error {
		return retry(func() error { return unix.Mkdirat(dir, base, uint32(perm.Perm())) })
	})
}

// MakeDir creates a directory and its missing parents, including the tree's own directory. When it returns, the entries
// of new directories are on disk.
func (t Tree) MakeDir(name string) error {
	name = filepath.Clean(name)
	if name == "." {
		return MakeDir(string(t))
	}
	err := t.Mkdir(name, 0o777)
	if errors.Is(err, fs.ErrNotExist) {
		if err := t.MakeDir(filepath.Dir(name)); err != nil {
			return err
		}
		err = t.Mkdir(name, 0o777)
	}
	if errors.Is(err, fs.ErrExist) {
		fi, err := t.Stat(name)
		switch {
		case err != nil:
			return err
		case fi.Mode()&fs.ModeSymlink != 0:
			return t.failed("mkdir", name, errLink)
		case !fi.IsDir():
			return t.failed("mkdir", name, errDir)
		}
		return nil
	}
	if err != nil {
		return err
	}
	return t.SyncDir(filepath.Dir(name))
}

// SyncDir waits until a directory's entries are on disk. It returns nil on a file system that can't sync directories.
func (t Tree) SyncDir(name string) error {
	d, err := t.OpenDir(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return syncDir(d)
}

// Names reports whether a name still leads to the open file. It opens the name, because only open(2) makes NFS ask the
// server; stat(2) may answer from a cache that is a minute old (nfs(5), close-to-open cache consistency).
func (t Tree) Names(name string, f *os.File) bool {
	var is, was unix.Stat_t
	fd, err := t.open(name, os.O_RDONLY, 0, &is)
	if err != nil {
		return false
	}
	defer unix.Close(fd) // kept open until after Fstat, so that no new file gets its inode
	err = retry(func() error { return unix.Fstat(int(f.Fd()), &was) })
	return err == nil && is.Dev == was.Dev && is.Ino == was.Ino
}

// OpenLock opens a file in order to lock it. It opens the file for writing, which an exclusive lock needs on NFS, or
// only for reading if this user may not write to it, which is enough elsewhere. flag may be os.O_CREATE.
func (t Tree) OpenLock(name string, flag int, perm fs.FileMode) (*os.File, error) {
	f, err := t.OpenFile(name, os.O_RDWR|flag, perm)
	if Unwritable(err) {
		if r, rerr := t.Open(name); rerr == nil {
			return r, nil
		}
	}
	return f, err
}

// LockFile opens and locks a regular file that other processes may replace or remove. The file that it returns is the
// one that the name leads to while the lock is held. It waits until ctx is done. how is as for [Lock]; with LOCK_NB it
// fails as [Busy] says.
func (t Tree) LockFile(ctx context.Context, name string, flag int, perm fs.FileMode, how int) (*os.File, error) {
	return t.LockOpened(ctx, name, how, func() (*os.File, error) { return t.OpenFile(name, flag, perm) })
}

// LockOpened is [Tree.LockFile] with a function that opens the file.
func (t Tree) LockOpened(ctx context.Context, name string, how int, open func() (*os.File, error)) (*os.File, error) {
	return lockNamed(ctx, how, open, func(f *os.File) bool { return t.Names(name, f) })
}

// Replace replaces a file atomically: it writes NAME.new and renames it, so readers see the old content or the new one.
// The caller must hold a lock that excludes other writers. If durable is set, the new content is on disk when Replace
// returns.
func (t Tree) Replace(name string, b []byte, perm fs.FileMode, durable bool) error {
	return t.ReplaceBy(name, perm, durable, writeBytes(b))
}

// ReplaceBy is [Tree.Replace] with a function that writes the content.
func (t Tree) ReplaceBy(name string, perm fs.FileMode, durable bool, write func(*os.File) error) error {
	temp := name + ".new"
	// Open the directory first: as soon as the file has its name, other processes may rename or remove the directory.
	dir, err := t.OpenDir(filepath.Dir(filepath.Clean(name)))
	if err != nil {
		return err
	}
	defer dir.Close()
	// A crash may have left a file of this name.
	if err := t.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err = t.CreateBy(temp, perm, durable, write); err == nil {
		err = t.Rename(temp, name)
	} else if errors.Is(err, fs.ErrExist) {
		return err // made by another process since
	}
	if err != nil {
		_ = t.Remove(temp)
		return err
	}
	if durable {
		return syncDir(dir)
	}
	return nil
}
