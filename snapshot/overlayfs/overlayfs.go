// Package overlayfs keeps each snapshot as a layer of its own and shows it on top of its
// parents by the kernel's overlayfs. Preparing takes the same time whatever the parents hold.
package overlayfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/snapshot"
	"distkit/snapshot/internal/tree"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Name is the driver's name.
const Name = "overlayfs"

// maxLower is the kernel's limit (OVL_MAX_STACK).
const maxLower = 500

// options pin what a distribution may have given other defaults: with any of these on, a
// layer's files could not be read without the mount, moved, or shared by several mounts.
var options = []string{"index=off", "metacopy=off", "redirect_dir=off"}

// userOptions do the same in a user namespace. userxattr takes no other redirect_dir.
var userOptions = []string{"index=off", "metacopy=off", "redirect_dir=nofollow", "userxattr"}

// Driver is the overlayfs driver. A snapshot's directory holds fs, its layer, and work, the
// kernel's scratch space.
//
// A store that is begun in a user namespace, where the extended attributes trusted.* can't be
// set, holds a file userxattr beside its snapshots: overlayfs then keeps its books in user.*,
// whoever mounts them.
type Driver struct{}

var _ snapshot.Driver = Driver{}

func (Driver) Name() string    { return Name }
func (Driver) MaxParents() int { return maxLower }

// marker is the file beside the snapshots of a store that uses userOptions.
const marker = "userxattr"

func (Driver) Init(dir string) error {
	if !sys.InUserNamespace() {
		return nil
	}
	return disk.Tree(dir).WriteFile(marker, nil, 0o600)
}

func (Driver) Whiteouts(dir string) string {
	if usesUserxattr(dir) {
		return "overlay-user"
	}
	return "overlay"
}

func usesUserxattr(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, marker))
	return err == nil
}

// optionsIn are the options of all overlay mounts of the store in dir.
func optionsIn(dir string) []string {
	if usesUserxattr(dir) {
		return userOptions
	}
	return options
}

func (Driver) Create(_ context.Context, t snapshot.Tree) error {
	if err := os.Mkdir(t.FS(), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(t.FS(), 0o755); err != nil { // whatever the umask
		return err
	}
	if isView(t) {
		return nil
	}
	if len(t.Parents) > 0 {
		// The root directory of the mount is the upper layer's.
		if err := tree.CopyAttributes(lower(t.Parents[0]), t.FS()); err != nil {
			return fmt.Errorf("copy attributes of the parent's root: %w", err)
		}
	}
	return os.Mkdir(work(t), 0o711)
}

func lower(parent string) string  { return filepath.Join(parent, "fs") }
func work(t snapshot.Tree) string { return filepath.Join(t.Dir, "work") }
func isView(t snapshot.Tree) bool { return t.Kind == snapshot.View }

// bindSource is the one directory that makes up a snapshot with nothing to overlay.
func bindSource(t snapshot.Tree) string {
	switch {
	case len(t.Parents) == 0:
		return t.FS()
	case len(t.Parents) == 1 && isView(t):
		return lower(t.Parents[0])
	}
	return ""
}

// Mounts gives an overlay the source by which a mount can be traced back to its snapshot.
func (Driver) Mounts(t snapshot.Tree) ([]snapshot.Mount, error) {
	if src := bindSource(t); src != "" {
		return []snapshot.Mount{snapshot.BindOf(t, src)}, nil
	}
	source, err := t.MountSource()
	if err != nil {
		return nil, err
	}
	var o []string
	if isView(t) {
		o = append(o, "ro", "nosuid", "nodev") // as DefaultMountOptions
	} else {
		o = append(o, "workdir="+escape(work(t), `\,`), "upperdir="+escape(t.FS(), `\,`))
	}
	lowers := make([]string, len(t.Parents))
	for i, p := range t.Parents {
		lowers[i] = escape(lower(p), `\:,`)
	}
	o = append(o, optionsIn(filepath.Dir(t.Dir))...)
	o = append(o, "lowerdir="+strings.Join(lowers, ":"))
	return []snapshot.Mount{{Type: "overlay", Source: source, Options: o}}, nil
}

// escape is the form overlayfs's option parser wants paths in.
func escape(path, special string) string {
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

func (Driver) Mount(t snapshot.Tree, target string, o snapshot.MountOptions) error {
	if src := bindSource(t); src != "" {
		return snapshot.BindMount(src, target, isView(t), o)
	}
	l, dir, err := overlay(t)
	if err != nil {
		return err
	}
	l.access = o
	if err := l.check(dir); err != nil {
		return err
	}
	if o.Users != nil {
		return l.mountMapped(dir, target)
	}
	return in(dir, func() error { return l.mount(target) })
}

// mountMapped mounts the layers with the owners that the access options map. An overlay shows the owners that its layers have in
// the mounts that their paths lead to: so a thread makes the overlay in a mount namespace of its own, in which the whole of dir is
// mounted with mapped owners. The overlay keeps that mount, and nobody else ever sees it.
func (l layers) mountMapped(dir, target string) error {
	fd := -1
	err := in(dir, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return snapshot.MountError("make a mount namespace", err)
		}
		if err := sys.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil { // nothing here reaches the caller's namespace
			return snapshot.MountError("make mounts private", err)
		}
		all, err := sys.OpenTree(unix.AT_FDCWD, ".", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return snapshot.MountError("copy the mount of "+dir, err)
		}
		defer unix.Close(all)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(l.access.Users.Fd())}
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

// overlay describes the snapshot's mount by paths relative to dir.
func overlay(t snapshot.Tree) (l layers, dir string, err error) {
	dir = filepath.Dir(t.Dir)
	l = layers{readOnly: isView(t), options: optionsIn(dir)}
	if l.source, err = t.MountSource(); err != nil {
		return l, dir, err
	}
	if !slices.Contains(l.options, "userxattr") && sys.InUserNamespace() {
		return l, dir, errdefs.ErrPermissionDenied.WithMessage("the store was begun outside of this user namespace, which can't mount its snapshots")
	}
	if !isView(t) {
		l.work = filepath.Join(filepath.Base(t.Dir), "work")
		l.upper = filepath.Join(filepath.Base(t.Dir), "fs")
	}
	for _, p := range t.Parents {
		l.lower = append(l.lower, filepath.Join(filepath.Base(p), "fs"))
	}
	return l, dir, nil
}

func (Driver) Open(t snapshot.Tree) (root *os.File, err error) {
	if src := bindSource(t); src != "" {
		return snapshot.OpenFiles(src)
	}
	l, dir, err := overlay(t)
	if err != nil {
		return nil, err
	}
	if err := l.check(dir); err != nil {
		return nil, err
	}
	err = in(dir, func() error {
		fd, err := l.create()
		if err == nil {
			defer unix.Close(fd)
			root, err = openAt(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
			return err
		}
		if !errors.Is(err, errOldKernel) {
			return err
		}
		target, err := os.MkdirTemp(t.Dir, "mount-")
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

// beMappedRoot gives this thread the IDs that root's files have in the mount. The overlay does its own work, in the directory work,
// with the credentials of who makes it, and the host's own root has no ID in the mount. The thread keeps all capabilities.
func (l layers) beMappedRoot() error {
	if l.readOnly {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(l.work, &st); err != nil {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	err := unix.Capget(&header, &caps[0])
	if err == nil {
		_, err = unix.SetfsgidRetGid(int(st.Gid))
	}
	if err == nil {
		_, err = unix.SetfsuidRetUid(int(st.Uid)) // which takes some capabilities away
	}
	if err == nil {
		err = unix.Capset(&header, &caps[0])
	}
	if err != nil {
		return fmt.Errorf("become root of the user namespace: %w", err)
	}
	return nil
}

// in runs f in a thread of its own whose working directory is dir: paths relative to it are
// short and need no escaping, and the process stays where it is.
func in(dir string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
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

// layers are the paths of one overlay mount.
type layers struct {
	lower       []string
	upper, work string
	source      string
	readOnly    bool
	access      snapshot.MountOptions
	options     []string
}

// check refuses layers whose paths below dir have symbolic links: the kernel follows those.
func (l layers) check(dir string) error {
	for _, name := range append(slices.Clone(l.lower), l.upper, l.work) {
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

func (l layers) mount(target string) error {
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

// create makes the mount without a place in the tree. errOldKernel says that the kernel
// (before 6.8) takes layers as one string only.
func (l layers) create() (int, error) {
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
				err = failed(fd, key+"="+value, err)
			}
		}
	}
	for i, dir := range l.lower {
		set("lowerdir+", dir)
		if i == 0 && errors.Is(err, unix.EINVAL) {
			return -1, errOldKernel
		}
	}
	set("source", l.source)
	attr := l.access.Attributes()
	if l.readOnly {
		attr |= unix.MOUNT_ATTR_RDONLY
	} else {
		set("upperdir", l.upper)
		set("workdir", l.work)
	}
	for _, o := range l.options {
		if key, value, ok := strings.Cut(o, "="); ok {
			set(key, value)
		} else if err == nil {
			if err = sys.FsconfigSetFlag(fd, o); err != nil {
				err = failed(fd, o, err)
			}
		}
	}
	if err != nil {
		return -1, err
	}
	if err := sys.FsconfigCreate(fd); err != nil {
		return -1, failed(fd, "make overlay", err)
	}
	m, err := sys.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attr)
	return m, snapshot.MountError("make overlay", err)
}

// failed adds what the kernel says about the failure.
func failed(fd int, what string, err error) error {
	b := make([]byte, 1024)
	for {
		n, rerr := unix.Read(fd, b)
		if rerr != nil || n == 0 {
			break
		}
		if msg, ok := bytes.CutPrefix(bytes.TrimSpace(b[:n]), []byte("e ")); ok {
			what += ": " + string(bytes.TrimPrefix(msg, []byte("overlay: ")))
		}
	}
	return snapshot.MountError(what, err)
}

// mountClassic is mount(2), whose options must fit a page.
func (l layers) mountClassic(target string) error {
	o := slices.Clone(l.options)
	flags := l.access.Flags()
	if l.readOnly {
		flags |= unix.MS_RDONLY
	} else {
		o = append(o, "upperdir="+l.upper, "workdir="+l.work)
	}
	data := strings.Join(append(o, "lowerdir="+strings.Join(l.lower, ":")), ",")
	if len(data) >= os.Getpagesize() {
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"%d layers don't fit into the mount options of this kernel, which Linux 6.8 and later take one by one", len(l.lower)))
	}
	return snapshot.MountError("mount overlay on "+target, sys.Mount(l.source, target, "overlay", flags, data))
}

// Check makes two layers and an overlay of them, without a place in the tree.
func (Driver) Check(_ context.Context, dir string) error {
	scratch, err := os.MkdirTemp(dir, ".overlayfs-")
	if err != nil {
		return fmt.Errorf("check overlayfs: %w", err)
	}
	defer tree.Remove(scratch)
	for _, d := range []string{"1", "2", "2/fs", "2/work"} {
		if err := os.Mkdir(filepath.Join(scratch, d), 0o755); err != nil {
			return fmt.Errorf("check overlayfs: %w", err)
		}
	}
	if err := os.Mkdir(filepath.Join(scratch, "1/fs"), 0o755); err != nil {
		return fmt.Errorf("check overlayfs: %w", err)
	}
	l := layers{lower: []string{"1/fs"}, upper: "2/fs", work: "2/work", source: "overlay", options: options}
	attribute := "trusted.overlay.opaque"
	if sys.InUserNamespace() {
		l.options = userOptions
		attribute = "user.overlay.opaque"
	}
	err = in(scratch, func() error {
		// The kernel mounts where these fail, and then can't delete what a lower layer has.
		if err := unix.Setxattr(l.upper, attribute, []byte("n"), 0); err != nil {
			return fmt.Errorf("set extended attribute %s: %w", attribute, err)
		}
		if err := unix.Mknod("2/whiteout", unix.S_IFCHR, 0); err != nil {
			return fmt.Errorf("make a whiteout: %w", err)
		}
		return l.try()
	})
	switch {
	case err == nil:
		return nil
	case errdefs.IsPermissionDenied(err), errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage("overlayfs needs root, or a user namespace: " + err.Error())
	}
	return errdefs.ErrNotImplemented.WithMessage("overlayfs doesn't work here: " + err.Error())
}

func (l layers) try() error {
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

func (Driver) Usage(ctx context.Context, t snapshot.Tree) (u snapshot.Usage, err error) {
	u.Size, u.Inodes, err = tree.Usage(ctx, t.FS())
	return u, err
}

func (Driver) Remove(_ context.Context, dir string) error { return tree.Remove(dir) }
