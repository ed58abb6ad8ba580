package tree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"distkit/disk/sys"

	"golang.org/x/sys/unix"
)

// Copy makes the existing, empty directory dst a copy of src. Files are cloned if the filesystem supports it, otherwise
// copied with their holes. Owners, modes, times, extended attributes, hard links, devices, pipes and sockets are copied
// too. Few files are open at a time, however deep src is.
func Copy(ctx context.Context, src, dst string) error {
	if err := copyTree(ctx, src, dst); err != nil {
		return fmt.Errorf("copy %s: %w", src, err)
	}
	return nil
}

func copyTree(ctx context.Context, src, dst string) error {
	from, err := sys.NewTrail(unix.AT_FDCWD, src)
	defer func() { from.Close() }()
	if err != nil {
		return err
	}
	to, err := sys.NewTrail(unix.AT_FDCWD, dst)
	defer func() { to.Close() }()
	if err != nil {
		return err
	}
	root, err := openDir(dst)
	if err != nil {
		return err
	}
	defer root.Close()
	c := copier{ctx: ctx, root: int(root.Fd()), links: map[inode]string{}, buf: make([]byte, 256<<10)}
	top, err := fstat(from.FD())
	if err != nil {
		return err
	}
	was := []unix.Stat_t{top} // attributes of the directories in from, before they were read
	var names []string        // names of the directories below the top
	for len(from) > 0 {
		name, err := from.Next()
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if name == "" {
			last := len(was) - 1
			// Last, because making entries changes the directory's times.
			if err := attributes(from.FD(), to.FD(), &was[last]); err != nil {
				return &os.PathError{Op: "copy", Path: path.Join(names...), Err: err}
			}
			if err := errors.Join(from.Up(), to.Up()); err != nil {
				return err
			}
			was, names = was[:last], names[:max(last-1, 0)]
			continue
		}
		st, err := c.entry(from.FD(), to.FD(), names, name)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			was, names = append(was, st), append(names, name)
			if err = from.Down(name); err == nil {
				err = to.Down(name)
			}
		}
		if err != nil {
			var pe *os.PathError
			if errors.As(err, &pe) || errors.Is(err, ctx.Err()) {
				return err
			}
			return &os.PathError{Op: "copy", Path: path.Join(path.Join(names...), name), Err: err}
		}
	}
	return nil
}

// CopyEntry copies the file name in the directory from to newname in the directory to, as Copy would. The file must not
// be a directory.
func CopyEntry(ctx context.Context, from *os.File, name string, to *os.File, newname string) error {
	c := copier{ctx: ctx, root: int(to.Fd()), links: map[inode]string{}, buf: make([]byte, 256<<10)}
	st, err := lstat(int(from.Fd()), name)
	if err == nil {
		err = c.leaf(int(from.Fd()), name, int(to.Fd()), newname, &st)
	}
	if err != nil {
		return fmt.Errorf("copy %s: %w", name, err)
	}
	return nil
}

// CopyAttributes gives the directory dst the owner, mode, times and extended attributes of src, except overlayfs's own
// attributes.
func CopyAttributes(src, dst string) error {
	from, err := openDir(src)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := openDir(dst)
	if err != nil {
		return err
	}
	defer to.Close()
	return CopyOpenAttributes(from, to)
}

// CopyOpenAttributes is CopyAttributes for open files.
func CopyOpenAttributes(from, to *os.File) error {
	st, err := fstat(int(from.Fd()))
	if err != nil {
		return err
	}
	return attributes(int(from.Fd()), int(to.Fd()), &st)
}

type copier struct {
	ctx      context.Context
	root     int
	links    map[inode]string // for inodes with several names: where the first was copied to
	buf      []byte
	noClone  bool // the filesystem does not support cloning
	noRanges bool // the filesystem does not support copy_file_range
}

func fstat(fd int) (st unix.Stat_t, err error) {
	err = sys.Fstat(fd, &st)
	return st, err
}

// entry copies the file name below the directories above. Of a directory it makes only the directory itself.
func (c *copier) entry(src, dst int, above []string, name string) (unix.Stat_t, error) {
	st, err := lstat(src, name)
	if err != nil {
		return st, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return st, sys.Mkdirat(dst, name, 0o700)
	}
	if st.Nlink > 1 {
		if first, ok := c.links[inodeOf(&st)]; ok {
			return st, sys.Linkat(c.root, first, dst, name, 0)
		}
		c.links[inodeOf(&st)] = path.Join(path.Join(above...), name)
	}
	return st, c.leaf(src, name, dst, name, &st)
}

// leaf copies a file that is not a directory.
func (c *copier) leaf(src int, name string, dst int, newname string, st *unix.Stat_t) error {
	typ := st.Mode & unix.S_IFMT
	switch typ {
	case unix.S_IFDIR:
		return unix.EISDIR
	case unix.S_IFREG:
		return c.file(src, name, dst, newname, st)
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := sys.Readlinkat(src, name, target)
		if err != nil {
			return err
		}
		if err := sys.Symlinkat(string(target[:n]), dst, newname); err != nil {
			return err
		}
	default:
		if err := sys.Mknodat(dst, newname, typ|0o600, int(st.Rdev)); err != nil {
			return err
		}
	}
	if err := sys.Fchownat(dst, newname, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if typ != unix.S_IFLNK {
		if err := sys.Fchmodat(dst, newname, st.Mode&0o7777, 0); err != nil {
			return err
		}
	}
	if err := copyXattrs(pathXattrs{procPath(src, name)}, pathXattrs{procPath(dst, newname)}); err != nil {
		return err
	}
	return sys.UtimesNanoAt(dst, newname, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// procPath returns a path to an entry of an open directory, for system calls that take only paths.
func procPath(at int, name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", at, name) }

func (c *copier) file(src int, name string, dst int, newname string, st *unix.Stat_t) error {
	fd, err := sys.Openat(src, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	from := os.NewFile(uintptr(fd), name)
	defer from.Close()
	fd, err = sys.Openat(dst, newname, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	to := os.NewFile(uintptr(fd), newname)
	defer to.Close()
	if st.Size > 0 {
		if err := c.data(from, to, st); err != nil {
			return err
		}
	}
	if err := attributes(int(from.Fd()), int(to.Fd()), st); err != nil {
		return err
	}
	return to.Close()
}

// attributes copies attributes: what chown clears (set-user-ID, capabilities) after the owner, and times last.
func attributes(from, to int, st *unix.Stat_t) error {
	if err := sys.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := sys.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(fdXattrs{from}, fdXattrs{to}); err != nil {
		return err
	}
	return sys.UtimesNanoAt(to, "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH)
}

func (c *copier) data(from, to *os.File, st *unix.Stat_t) error {
	if !c.noClone {
		err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
		if err == nil {
			return nil
		}
		if errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return err
		}
		c.noClone = true
	}
	if st.Blocks*512 >= st.Size && st.Size <= int64(len(c.buf)) {
		n, err := io.ReadFull(from, c.buf[:st.Size])
		if err != nil {
			return err
		}
		_, err = to.Write(c.buf[:n])
		return err
	}
	for off := int64(0); off < st.Size; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		data, err := unix.Seek(int(from.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // a hole up to the end
		}
		end := st.Size
		if err != nil {
			data = off // the filesystem does not report holes
		} else if end, err = unix.Seek(int(from.Fd()), data, unix.SEEK_HOLE); err != nil {
			return err
		}
		if err := c.extent(from, to, data, end); err != nil {
			return err
		}
		off = end
	}
	return to.Truncate(st.Size)
}

func (c *copier) extent(from, to *os.File, off, end int64) error {
	for off < end && !c.noRanges {
		in, out := off, off
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, int(min(end-off, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
			return err
		case err != nil, n == 0:
			c.noRanges = true
		}
		off += int64(max(n, 0))
	}
	for off < end {
		n, err := from.ReadAt(c.buf[:min(end-off, int64(len(c.buf)))], off)
		if n == 0 && err != nil {
			return err
		}
		if _, err := to.WriteAt(c.buf[:n], off); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// xattrs accesses the extended attributes of a file by descriptor or by path.
type xattrs interface {
	list(b []byte) (int, error)
	get(name string, b []byte) (int, error)
	set(name string, b []byte) error
}

type fdXattrs struct{ fd int }

func (x fdXattrs) list(b []byte) (int, error)          { return unix.Flistxattr(x.fd, b) }
func (x fdXattrs) get(n string, b []byte) (int, error) { return unix.Fgetxattr(x.fd, n, b) }
func (x fdXattrs) set(n string, b []byte) error        { return sys.Fsetxattr(x.fd, n, b, 0) }

type pathXattrs struct{ path string }

func (x pathXattrs) list(b []byte) (int, error)          { return unix.Llistxattr(x.path, b) }
func (x pathXattrs) get(n string, b []byte) (int, error) { return unix.Lgetxattr(x.path, n, b) }
func (x pathXattrs) set(n string, b []byte) error        { return sys.Lsetxattr(x.path, n, b, 0) }

func copyXattrs(from, to xattrs) error {
	names, err := sys.Grow(from.list)
	if errors.Is(err, unix.ENOTSUP) || len(names) == 0 && err == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes: %w", err)
	}
	for _, n := range bytes.Split(bytes.TrimSuffix(names, []byte{0}), []byte{0}) {
		name := string(n)
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		value, err := sys.Grow(func(b []byte) (int, error) { return from.get(name, b) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err == nil {
			err = to.set(name, value)
		}
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("extended attribute %s: %w", name, err)
		}
	}
	return nil
}
