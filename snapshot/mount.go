package snapshot

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// MountOptions restrict what can be done with the files of a mount.
type MountOptions struct {
	NoSuid bool // ignore set-user-ID bits and file capabilities
	NoDev  bool // refuse to open device files
	NoExec bool // refuse to execute programs

	// Users is a user namespace, or nil. The mount maps owners by it: files that belong to 0 on disk belong to root of
	// that namespace in the mount. On disk the owners do not change.
	Users *os.File
}

// DefaultMountOptions are the options that [Snapshotter.Mount] uses. A view is mounted to be read, perhaps where any
// user can reach it: none of its programs may run with the rights of its owner.
func DefaultMountOptions(k Kind) MountOptions {
	return MountOptions{NoSuid: k == View, NoDev: k == View}
}

// words returns the options as mount(8) and /proc/self/mountinfo name them.
func (o MountOptions) words() (words []string) {
	if o.NoSuid {
		words = append(words, "nosuid")
	}
	if o.NoDev {
		words = append(words, "nodev")
	}
	if o.NoExec {
		words = append(words, "noexec")
	}
	return words
}

// Attributes returns the options as attributes for mount_setattr(2) and fsmount(2).
func (o MountOptions) Attributes() (attributes int) {
	if o.NoSuid {
		attributes |= unix.MOUNT_ATTR_NOSUID
	}
	if o.NoDev {
		attributes |= unix.MOUNT_ATTR_NODEV
	}
	if o.NoExec {
		attributes |= unix.MOUNT_ATTR_NOEXEC
	}
	return attributes
}

// Flags returns the options as flags for mount(2).
func (o MountOptions) Flags() (flags uintptr) {
	if o.NoSuid {
		flags |= unix.MS_NOSUID
	}
	if o.NoDev {
		flags |= unix.MS_NODEV
	}
	if o.NoExec {
		flags |= unix.MS_NOEXEC
	}
	return flags
}

// Mount calls [Snapshotter.MountWith] with the default options.
func (s *Snapshotter) Mount(ctx context.Context, key, target string) error {
	return s.mountAs(key, target, DefaultMountOptions)
}

// MountWith mounts an active snapshot or a view on the directory target. It does nothing if the snapshot is mounted
// there already with these options. Unavailable: it is mounted there with other options, another snapshot is mounted
// there, or another process is committing or removing the snapshot.
func (s *Snapshotter) MountWith(ctx context.Context, key, target string, o MountOptions) error {
	return s.mountAs(key, target, func(Kind) MountOptions { return o })
}

func (s *Snapshotter) mountAs(key, target string, options func(Kind) MountOptions) error {
	if err := retry(func() error { return s.mount(key, target, options) }); err != nil {
		return fmt.Errorf("mount %s: %w", key, err)
	}
	return nil
}

func (s *Snapshotter) mount(key, target string, options func(Kind) MountOptions) error {
	e, err := s.lookupIntact(key)
	if err != nil {
		return err
	}
	// The lock keeps Commit and Remove from running until the mount is visible to them. The record is read again under
	// the lock.
	held, err := s.lockSnapshot(e, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer disk.Release(held)
	if e, err = s.read(e.id); err != nil || e.Key != key {
		return cmp.Or(err, errChanged)
	}
	if e.Kind == Committed {
		return errCommitted
	}
	t := s.tree(e.id, e.record)
	o := options(e.Kind)
	real, err := realDir(target)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(target, "/proc/") { // else it names an open directory, whatever is at its path by now
		target = real
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	if m, ok := table.topmost(real); ok {
		files, err := s.filesShown(t)
		if err != nil {
			return err
		}
		switch {
		case m.shows(files) && o.Users != nil:
			return errdefs.ErrUnavailable.WithMessage("it is mounted on " + real + ", and may have other owners there: unmount it first")
		case m.shows(files):
			for _, w := range o.words() {
				if !slices.Contains(m.options, w) {
					return errdefs.ErrUnavailable.WithMessage("it is mounted on " + real + " without " + w + ": unmount it first")
				}
			}
			return nil
		case m.ofSnapshot():
			return errdefs.ErrUnavailable.WithMessage("another snapshot is mounted on " + real)
		}
	}
	step("mounting")
	return s.driver.Mount(t, target, o)
}

// lockSnapshot locks a snapshot's directory without waiting. Mounting it and preparing from it take a shared lock, committing
// and removing it an exclusive one. The error is errChanged if the snapshot is gone.
func (s *Snapshotter) lockSnapshot(e entry, how int) (*os.File, error) {
	f, err := lockFile(context.Background(), s.dirOf(e.id), unix.O_DIRECTORY, how|unix.LOCK_NB)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errChanged
	case errors.Is(err, unix.EWOULDBLOCK) && how == unix.LOCK_SH:
		return nil, fmt.Errorf("it is being committed or removed: %w", err)
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil, fmt.Errorf("it is being mounted, prepared from, committed or removed: %w", err)
	}
	return f, err
}

// checkUnmounted returns Unavailable if a snapshot is mounted. The caller holds the lock on its directory.
func (s *Snapshotter) checkUnmounted(e entry) error {
	where, err := mountsOf(s.tree(e.id, e.record))
	if err == nil && len(where) > 0 {
		err = errdefs.ErrUnavailable.WithMessage("it is mounted on " + strings.Join(where, ", "))
	}
	return err
}

// UnmountAll unmounts an active snapshot or a view wherever it is mounted in this process's mount namespace. A
// committed snapshot is never mounted itself. Unavailable: it is in use, or the mount may be another view of the same
// files.
func (s *Snapshotter) UnmountAll(_ context.Context, key string) error {
	err := func() error {
		e, err := s.lookup(key)
		if err != nil || e.Kind == Committed {
			return err
		}
		where, err := s.mountsOf(e)
		if err != nil {
			return err
		}
		for _, target := range slices.Backward(where) { // the newest mount is on top
			if err := unmount(target, target); err != nil {
				return fmt.Errorf("%s: %w", target, err)
			}
		}
		return nil
	}()
	if err != nil {
		return fmt.Errorf("unmount %s: %w", key, err)
	}
	return nil
}

// Unmount unmounts the snapshot mounted on the directory target. It does nothing if nothing is mounted there.
// FailedPrecondition: the mount is not one of a snapshot. Unavailable: it is in use.
func Unmount(target string) error {
	real, err := realDir(target)
	if err == nil && strings.HasPrefix(target, "/proc/") { // it leads through an open directory, whatever is at its path by now
		err = unmount(real, target)
	} else if err == nil {
		err = unmount(real, real)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", cmp.Or(real, target), err)
	}
	return nil
}

// unmount unmounts what is on the directory dir, by a path to that.
func unmount(dir, path string) error {
	table, err := readMounts()
	if err != nil {
		return err
	}
	m, ok := table.topmost(dir)
	if !ok {
		return nil
	}
	if !m.ofSnapshot() {
		return errdefs.ErrFailedPrecondition.WithMessage("what is mounted there is no snapshot (" + m.fstype + ")")
	}
	switch err := sys.Unmount(path, unix.UMOUNT_NOFOLLOW); {
	case errors.Is(err, unix.EBUSY):
		return errdefs.ErrUnavailable.WithMessage("it is in use")
	case errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage("only root can unmount")
	default:
		return err
	}
}

func realDir(name string) (string, error) {
	dir, err := filepath.Abs(name)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return "", errdefs.ErrNotFound.WithMessage("no such directory: " + name)
	}
	if err != nil {
		return "", err
	}
	if fi, err := os.Stat(dir); err != nil {
		return "", err
	} else if !fi.IsDir() {
		return "", errdefs.ErrInvalidArgument.WithMessage("not a directory: " + name)
	}
	return dir, nil
}

// OpenFiles opens the directory ID/fs of a store's snapshots. Neither ID nor fs may be a symbolic link.
func OpenFiles(dir string) (*os.File, error) {
	snapshot, name := filepath.Split(dir)
	store, id := filepath.Split(filepath.Clean(snapshot))
	return disk.Tree(store).OpenDir(filepath.Join(id, name))
}

// BindMount mounts the directory source on target, read-only if asked. It needs CAP_SYS_ADMIN: an ordinary user can
// call it only in a user namespace of their own.
func BindMount(source, target string, readOnly bool, o MountOptions) error {
	// no symbolic link in the store is followed
	dir, err := OpenFiles(source)
	if err != nil {
		return err
	}
	defer dir.Close()
	fd, err := sys.OpenTree(int(dir.Fd()), "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		// Private, so that later mounts below the target do not appear in the store.
		attr := unix.MountAttr{Propagation: unix.MS_PRIVATE, Attr_set: uint64(o.Attributes())}
		if readOnly {
			attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
		}
		if o.Users != nil {
			attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
			attr.Userns_fd = uint64(o.Users.Fd())
		}
		err = sys.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
		if err == nil {
			err = sys.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
	}
	if o.Users != nil && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)) {
		return NotMapped(source)
	}
	if errors.Is(err, unix.ENOSYS) {
		flags := o.Flags()
		if readOnly {
			flags |= unix.MS_RDONLY
		}
		err = bindMount(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), target, flags)
	}
	return MountError("bind "+source+" to "+target, err)
}

// NotMapped returns the error for [MountOptions] with Users if the kernel or the directory's file system does not
// support mapped owners.
func NotMapped(dir string) error {
	return errdefs.ErrNotImplemented.WithMessage("owners can't be mapped in a mount of " + dir + ": its file system or the kernel has no ID-mapped mounts")
}

// bindMount is for kernels before 5.12, which lack mount_setattr.
func bindMount(source, target string, flags uintptr) error {
	if err := sys.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	err := sys.Mount("", target, "", unix.MS_PRIVATE, "")
	if err == nil && flags != 0 {
		err = sys.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
	}
	if err != nil {
		_ = sys.Unmount(target, 0)
	}
	return err
}

// MountError classes the error of a system call for mounting. what names the step that failed.
func MountError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage(what + ": only root can mount (CAP_SYS_ADMIN)")
	case errors.Is(err, unix.ENOENT):
		return errdefs.ErrNotFound.WithMessage(what + ": no such file or directory")
	}
	return fmt.Errorf("%s: %w", what, err)
}

// ContextError is MountError for a system call on the file system context fd. It appends the kernel's own message about
// the failure.
func ContextError(fd int, what string, err error) error {
	b := make([]byte, 1024)
	for {
		n, rerr := unix.Read(fd, b)
		if rerr != nil || n == 0 {
			break
		}
		if msg, ok := bytes.CutPrefix(bytes.TrimSpace(b[:n]), []byte("e ")); ok {
			if _, rest, ok := bytes.Cut(msg, []byte(": ")); ok { // skip the name of the file system
				msg = rest
			}
			what += ": " + string(msg)
		}
	}
	return MountError(what, err)
}

// removeFiles deletes the directory of a detached snapshot.
func (s *Snapshotter) removeFiles(ctx context.Context, dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n.Name(), BrieflyMounted) {
			_ = sys.Unmount(filepath.Join(dir, n.Name()), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // EINVAL: not mounted
		}
	}
	return s.driver.Remove(ctx, dir)
}
