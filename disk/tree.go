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

// Tree is a directory whose content may come from strangers, such as a store. The path itself is trusted; nothing
// below it is: a name in it is resolved one component at a time, and a symbolic link on the way is refused, never
// followed. So is a last component of an unexpected kind. A FIFO, a device or a socket is never waited for.
//
// Names are relative to the directory, with slashes; "." is the directory itself. Errors are *fs.PathError. What is
// refused because of its kind or size is FailedPrecondition.
type Tree string

// Path is the path of a name, for messages and for programs that are told a path.
func (t Tree) Path(name string) string { return filepath.Join(string(t), name) }

// unfit is the reason why a file of a tree isn't used.
type unfit string

func (u unfit) Error() string      { return string(u) }
func (unfit) Is(target error) bool { return target == errdefs.ErrFailedPrecondition }

const (
	errLink    = unfit("is a symbolic link, which is not followed")
	errRegular = unfit("is not a regular file")
	errDir     = unfit("is not a directory")
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

// openDir opens the directory of a clean relative path, in one call if the system can, or component by component.
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

// kindOf is errLink if the name is a symbolic link, and otherwise the error given.
func kindOf(dir int, name string, otherwise error) error {
	var st unix.Stat_t
	if statAt(dir, name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return errLink
	}
	return otherwise
}

func statAt(dir int, name string, st *unix.Stat_t) error {
	return retry(func() error { return unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) })
}

// at calls f with the directory of a name and its last component.
func (t Tree) at(op, name string, f func(dir int, base string) error) error {
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

// OpenFile opens a regular file. With os.O_CREATE it creates the file if there is nothing of that name.
func (t Tree) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	var st unix.Stat_t
	fd, err := t.open(name, flag, perm, &st)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), t.Path(name)), nil
}

// open is OpenFile for a descriptor. It describes the open file in st.
func (t Tree) open(name string, flag int, perm fs.FileMode, st *unix.Stat_t) (fd int, err error) {
	err = t.at("open", name, func(dir int, base string) error {
		// To open a device can have effects, so its kind is looked at before.
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

// ReadFile returns what a regular file holds. A file of more than limit bytes is FailedPrecondition, and not read.
func (t Tree) ReadFile(name string, limit int64) ([]byte, error) {
	f, err := t.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := ReadAll(f, limit)
	return b, t.failed("read", name, err)
}

// ReadAll reads an open regular file from where it stands to its end. A file of more than limit bytes is
// FailedPrecondition.
func ReadAll(f *os.File, limit int64) ([]byte, error) {
	large := unfit(fmt.Sprintf("is larger than %d bytes", limit))
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
		if len(b) == cap(b) { // it has grown
			b = append(b, 0)[:len(b)]
		}
	}
}

// Unwritable reports whether an operation failed because this user may not write there, or nobody can: the mount is read-only.
func Unwritable(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)
}

// Cause returns the error within an *fs.PathError or *os.LinkError, for a message that names the object already.
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

// WriteFile replaces what a file holds, in place; it creates the file if there is none.
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

// Create writes a new file, whose content is on disk when it returns if durable is set. fs.ErrExist if the name is taken.
func (t Tree) Create(name string, b []byte, perm fs.FileMode, durable bool) error {
	return t.CreateBy(name, perm, durable, writes(b))
}

func writes(b []byte) func(*os.File) error {
	return func(f *os.File) error {
		_, err := f.Write(b)
		return err
	}
}

// CreateBy is Create with what write writes. If it fails, and not with fs.ErrExist, a part of the file may be left.
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

// Stat describes a name without following it: of a symbolic link, the link.
func (t Tree) Stat(name string) (fs.FileInfo, error) {
	info := &fileInfo{name: filepath.Base(name)}
	err := t.at("stat", name, func(dir int, base string) error { return statAt(dir, base, &info.st) })
	if err != nil {
		return nil, err
	}
	return info, nil
}

// StatAt is [Tree.Stat] of a name in an open directory, such as one that [Tree.OpenDir] has opened.
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

// Remove removes a file. Of a symbolic link, the link is removed.
func (t Tree) Remove(name string) error { return t.remove(name, 0) }

// RemoveDir removes an empty directory.
func (t Tree) RemoveDir(name string) error { return t.remove(name, unix.AT_REMOVEDIR) }

func (t Tree) remove(name string, flag int) error {
	return t.at("remove", name, func(dir int, base string) error {
		return retry(func() error { return unix.Unlinkat(dir, base, flag) })
	})
}

// Rename renames a file or directory within the tree.
func (t Tree) Rename(from, to string) error {
	return t.both("rename", from, to, func(fromDir int, from string, toDir int, to string) error {
		return unix.Renameat(fromDir, from, toDir, to)
	})
}

// RenameNew is Rename unless there is a file of the new name: fs.ErrExist. EINVAL, ENOSYS or ENOTSUP where the file system can't
// tell.
func (t Tree) RenameNew(from, to string) error { return t.both("rename", from, to, renameNew) }

// Link gives a file another name, which must not exist.
func (t Tree) Link(from, to string) error {
	return t.both("link", from, to, func(fromDir int, from string, toDir int, to string) error {
		return unix.Linkat(fromDir, from, toDir, to, 0)
	})
}

// LinkFile gives an open file another name, which must not exist. It needs /proc, and fails between mounts (EXDEV).
func (t Tree) LinkFile(f *os.File, to string) error {
	return t.at("link", to, func(dir int, base string) error {
		return unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())), dir, base, unix.AT_SYMLINK_FOLLOW)
	})
}

func (t Tree) both(op, from, to string, f func(fromDir int, from string, toDir int, to string) error) error {
	var inner error // already names the second file
	err := t.at(op, from, func(fromDir int, fromBase string) error {
		inner = t.at(op, to, func(toDir int, toBase string) error {
			return retry(func() error { return f(fromDir, fromBase, toDir, toBase) })
		})
		return nil
	})
	return errors.Join(err, inner)
}

// Symlink makes a symbolic link, which holds the text target.
func (t Tree) Symlink(target, name string) error {
	return t.at("symlink", name, func(dir int, base string) error {
		return retry(func() error { return unix.Symlinkat(target, dir, base) })
	})
}

// Readlink returns the text of a symbolic link.
func (t Tree) Readlink(name string) (target string, err error) {
	b := make([]byte, unix.PathMax)
	err = t.at("readlink", name, func(dir int, base string) error {
		return retry(func() error {
			n, err := unix.Readlinkat(dir, base, b)
			target = string(b[:max(n, 0)])
			return err
		})
	})
	return target, err
}

// RemoveAll removes a file, or a directory with all that it holds. It is nil if there is none.
func (t Tree) RemoveAll(name string) error {
	return t.at("remove", name, removeAll)
}

// Chtimes sets the times of a file, not of what a symbolic link leads to.
func (t Tree) Chtimes(name string, at time.Time) error {
	ts := unix.NsecToTimespec(at.UnixNano())
	return t.at("chtimes", name, func(dir int, base string) error {
		return retry(func() error {
			return unix.UtimesNanoAt(dir, base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
		})
	})
}

// Touch is Chtimes for a file that was just written. Where nobody may set times (some of FUSE: EPERM, ENOSYS) the file keeps
// those of the write, and that is no error.
func (t Tree) Touch(name string, at time.Time) error {
	err := t.Chtimes(name, at)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// Mkdir creates a directory. The mode is less the umask.
func (t Tree) Mkdir(name string, perm fs.FileMode) error {
	return t.at("mkdir", name, func(dir int, base string) error {
		return retry(func() error { return unix.Mkdirat(dir, base, uint32(perm.Perm())) })
	})
}

// MakeDir creates a directory, and those above it down from the tree's own, unless they exist. When it returns, the
// entries of new ones are on disk.
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

// SyncDir waits until a directory's entries are on disk, where its file system can tell.
func (t Tree) SyncDir(name string) error {
	d, err := t.OpenDir(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return syncDir(d)
}

// Names reports whether a name still leads to the open file. It opens the name: only open(2) makes NFS ask the server what a
// name leads to, where stat(2) may answer from what was known a minute ago (nfs(5), close-to-open cache consistency).
func (t Tree) Names(name string, f *os.File) bool {
	var is, was unix.Stat_t
	fd, err := t.open(name, os.O_RDONLY, 0, &is)
	if err != nil {
		return false
	}
	defer unix.Close(fd) // while it is open no other file gets its inode
	err = retry(func() error { return unix.Fstat(int(f.Fd()), &was) })
	return err == nil && is.Dev == was.Dev && is.Ino == was.Ino
}

// OpenLock opens a file whose lock is wanted: for writing, which an exclusive lock needs on NFS; or for reading if this user may
// not write to it, which is enough elsewhere. flag may be os.O_CREATE.
func (t Tree) OpenLock(name string, flag int, perm fs.FileMode) (*os.File, error) {
	f, err := t.OpenFile(name, os.O_RDWR|flag, perm)
	if Unwritable(err) {
		if r, rerr := t.Open(name); rerr == nil {
			return r, nil
		}
	}
	return f, err
}

// LockFile opens a regular file, which others may replace or remove, and locks it: what it returns is what the name
// leads to. how is as for Lock; with LOCK_NB it fails as [Busy] does. It waits until ctx is done.
func (t Tree) LockFile(ctx context.Context, name string, flag int, perm fs.FileMode, how int) (*os.File, error) {
	return t.LockOpened(ctx, name, how, func() (*os.File, error) { return t.OpenFile(name, flag, perm) })
}

// LockOpened is LockFile with a function that opens the file.
func (t Tree) LockOpened(ctx context.Context, name string, how int, open func() (*os.File, error)) (*os.File, error) {
	return lockNamed(ctx, how, open, func(f *os.File) bool { return t.Names(name, f) })
}

// Replace atomically replaces a file: it writes NAME.new and renames it, so readers see old or new content. The caller
// holds the lock that excludes other writers. If durable is set, the new content is on disk when Replace returns.
func (t Tree) Replace(name string, b []byte, perm fs.FileMode, durable bool) error {
	return t.ReplaceBy(name, perm, durable, writes(b))
}

// ReplaceBy is Replace with what write writes.
func (t Tree) ReplaceBy(name string, perm fs.FileMode, durable bool, write func(*os.File) error) error {
	aside := name + ".new"
	// Opened before: once the file has its name others may rename or remove the directory.
	dir, err := t.OpenDir(filepath.Dir(filepath.Clean(name)))
	if err != nil {
		return err
	}
	defer dir.Close()
	// A crash may have left anything there.
	if err := t.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err = t.CreateBy(aside, perm, durable, write); err == nil {
		err = t.Rename(aside, name)
	} else if errors.Is(err, fs.ErrExist) {
		return err // another process's
	}
	if err != nil {
		_ = t.Remove(aside)
		return err
	}
	if durable {
		return syncDir(dir)
	}
	return nil
}
