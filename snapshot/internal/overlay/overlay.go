// Package overlay makes overlayfs mounts.
package overlay

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/snapshot"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Options turn off features that a distribution may have turned on by default. With any of them, a layer's files could
// not be read without the mount, moved, or shared by several mounts.
var Options = []string{"index=off", "metacopy=off", "redirect_dir=off"}

// UserOptions are Options for a user namespace. With userxattr, redirect_dir must be nofollow.
var UserOptions = []string{"index=off", "metacopy=off", "redirect_dir=nofollow", "userxattr"}

// Layers are the directories and options of an overlay mount.
type Layers struct {
	Lower       []string // nearest first
	Upper, Work string
	Source      string
	ReadOnly    bool
	Access      snapshot.MountOptions
	Options     []string
}

// Check returns an error if a layer's path has a symbolic link below dir: the kernel would follow it.
func (l Layers) Check(dir string) error {
	for _, name := range append(slices.Clone(l.Lower), l.Upper, l.Work) {
		if name == "" {
			continue
		}
		d, err := disk.Tree(dir).OpenDir(name)
		if err == nil {
			err = d.Close()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Mount mounts the overlay on target. The layers' paths are relative to the working directory: see In.
func (l Layers) Mount(target string) error {
	fd, err := l.create()
	switch {
	case err == nil:
		defer unix.Close(fd)
		return snapshot.MountError("mount on "+target, sys.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
	case errors.Is(err, errOldKernel):
		return l.mountClassic(target)
	}
	return err
}

var errOldKernel = errors.New("no lowerdir+")

// create makes the mount, detached from the tree of mounts. errOldKernel: the kernel is older than 6.8 and takes layers
// only as one string.
func (l Layers) create() (int, error) {
	fd, err := sys.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENOSYS):
		return -1, errOldKernel
	case errors.Is(err, unix.ENODEV):
		return -1, errdefs.ErrNotImplemented.WithMessage("the kernel has no overlayfs")
	case err != nil:
		return -1, snapshot.MountError("open overlayfs", err)
	}
	defer unix.Close(fd)
	set := func(key, value string) {
		if err == nil {
			if err = sys.FsconfigSetString(fd, key, value); err != nil {
				err = snapshot.ContextError(fd, key+"="+value, err)
			}
		}
	}
	for i, dir := range l.Lower {
		set("lowerdir+", dir)
		if i == 0 && errors.Is(err, unix.EINVAL) {
			return -1, errOldKernel
		}
	}
	set("source", l.Source)
	attr := l.Access.Attributes()
	if l.ReadOnly {
		attr |= unix.MOUNT_ATTR_RDONLY
	} else {
		set("upperdir", l.Upper)
		set("workdir", l.Work)
	}
	for _, o := range l.Options {
		if key, value, ok := strings.Cut(o, "="); ok {
			set(key, value)
		} else if err == nil {
			if err = sys.FsconfigSetFlag(fd, o); err != nil {
				err = snapshot.ContextError(fd, o, err)
			}
		}
	}
	if err != nil {
		return -1, err
	}
	if err := sys.FsconfigCreate(fd); err != nil {
		return -1, snapshot.ContextError(fd, "make overlay", err)
	}
	m, err := sys.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	return m, snapshot.MountError("make overlay", err)
}

// mountClassic uses mount(2), whose options must fit into a page.
func (l Layers) mountClassic(target string) error {
	o := slices.Clone(l.Options)
	flags := l.Access.Flags()
	if l.ReadOnly {
		flags |= unix.MS_RDONLY
	} else {
		o = append(o, "upperdir="+l.Upper, "workdir="+l.Work)
	}
	data := strings.Join(append(o, "lowerdir="+strings.Join(l.Lower, ":")), ",")
	if len(data) >= os.Getpagesize() {
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"%d layers don't fit into the mount options of this kernel, which Linux 6.8 and later take one by one", len(l.Lower)))
	}
	return snapshot.MountError("mount overlay on "+target, sys.Mount(l.Source, target, "overlay", flags, data))
}

// MountMapped mounts the overlay with owners mapped by the access options. An overlay shows the owners that its layers
// have in the mounts by which they are reached. So a thread makes the overlay in its own mount namespace, where all of
// dir is mounted with mapped owners. Mounts below dir are included and keep their own owners. The overlay keeps that
// mount alive, and no other process sees it.
func (l Layers) MountMapped(dir, target string) error {
	fd := -1
	err := In(dir, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return snapshot.MountError("make a mount namespace", err)
		}
		if err := sys.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil { // keeps the mounts made here out of the caller's namespace
			return snapshot.MountError("make mounts private", err)
		}
		all, err := sys.OpenTree(unix.AT_FDCWD, ".", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return snapshot.MountError("copy the mount of "+dir, err)
		}
		defer unix.Close(all)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(l.Access.Users.Fd())}
		switch err := sys.MountSetattr(all, "", unix.AT_EMPTY_PATH, &attr); {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
			return snapshot.NotMapped(dir)
		case err != nil:
			return snapshot.MountError("map the owners of "+dir, err)
		}
		if err := sys.MoveMount(all, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return snapshot.MountError("mount "+dir, err)
		}
		if err := unix.Chdir(dir); err != nil {
			return err
		}
		if err := l.beMappedRoot(); err != nil {
			return err
		}
		if fd, err = l.create(); errors.Is(err, errOldKernel) {
			return snapshot.NotMapped(dir)
		}
		return err
	})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return snapshot.MountError("mount on "+target, sys.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}

// beMappedRoot gives this thread the IDs that root's files have in the mapped mount. Overlayfs works in its work
// directory with the credentials of the mounter, and the host's root has no ID in that mount. The thread keeps all
// capabilities.
func (l Layers) beMappedRoot() error {
	if l.ReadOnly {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(l.Work, &st); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	err := unix.Capget(&header, &caps[0])
	if err == nil {
		_, err = unix.SetfsgidRetGid(int(st.Gid))
	}
	if err == nil {
		_, err = unix.SetfsuidRetUid(int(st.Uid)) // this clears some capabilities
	}
	if err == nil {
		err = unix.Capset(&header, &caps[0])
	}
	if err != nil {
		return fmt.Errorf("become root of the user namespace: %w", err)
	}
	return nil
}

// Try makes the mount, detached and with paths relative to the working directory, and removes it at once.
func (l Layers) Try() error {
	fd, err := l.create()
	if err == nil {
		return unix.Close(fd)
	}
	if !errors.Is(err, errOldKernel) {
		return err
	}
	target := "mnt"
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if err := l.mountClassic(target); err != nil {
		return err
	}
	return sys.Unmount(target, unix.MNT_DETACH)
}

// In runs f in a separate thread with dir as working directory. Paths relative to dir are short and need no escaping,
// and the process's own working directory does not change.
func In(dir string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Chdir(dir)
		}
		if err != nil {
			err = fmt.Errorf("change to %s: %w", dir, err)
		} else {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// Open opens the root directory of the overlay, whose layers are relative to dir. Kernels before 6.8 have to mount it
// on a directory in scratch for a moment.
func (l Layers) Open(dir, scratch string) (root *os.File, err error) {
	err = In(dir, func() error {
		fd, err := l.create()
		if err == nil {
			defer unix.Close(fd)
			root, err = OpenRoot(fd)
			return err
		}
		if !errors.Is(err, errOldKernel) {
			return err
		}
		target, err := os.MkdirTemp(scratch, snapshot.BrieflyMounted+"*")
		if err != nil {
			return err
		}
		if err := l.mountClassic(target); err != nil {
			return err
		}
		root, err = os.Open(target)
		return errors.Join(err, sys.Unmount(target, unix.MNT_DETACH), os.Remove(target))
	})
	return root, err
}

// OpenRoot opens the root directory of a mount.
func OpenRoot(mount int) (*os.File, error) {
	fd, err := sys.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, snapshot.MountError("open the root of a mount", err)
	}
	return os.NewFile(uintptr(fd), "mount"), nil
}

// Escape escapes a path for overlayfs's parser of options.
func Escape(path, special string) string {
	if !strings.ContainsAny(path, special) {
		return path
	}
	var b strings.Builder
	for _, c := range []byte(path) {
		if strings.IndexByte(special, c) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(c)
	}
	return b.String()
}
