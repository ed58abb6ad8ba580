package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Runtimes take paths. The owner of a store can replace any directory on such a path with a link after the path was
// checked, so that root would mount a file of the host in a container. So everything that a container gets from the
// store is opened, checked, and then mounted below the run's private directory, which nobody else can change. This
// happens in a separate mount namespace, where the runtime is started. The host never sees these mounts. The kernel
// removes them with the last process in the namespace, whichever process is killed.

// privateMounts is a mount namespace with its root directory. In a chroot, that is not the root of the namespace's
// first mount.
type privateMounts struct{ namespace, root *os.File }

// mountPrivately mounts privately those files of the store, and the namespaces to be joined, that a container's
// configuration names, and changes the configuration to match. users is the container's user namespace, by which the
// owners of files in volumes are mapped; nil means that they are the host's.
func (u *execution) mountPrivately(s *specs.Spec, users *os.File) error {
	var stored []int
	for i, m := range s.Mounts {
		if _, ok := u.c.set.stored(m.Source); ok && isBind(m) {
			stored = append(stored, i)
		}
	}
	_, storedRoot := u.c.set.stored(s.Root.Path)
	if len(stored)+len(u.joined) == 0 && !storedRoot {
		return nil
	}
	dir := u.claim.path("mounts")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if storedRoot {
		if err := letSearch(s.Linux, u.claim.state, filepath.Dir(u.claim.dir), u.claim.dir, dir); err != nil {
			return err
		}
	}
	m := &privateMounts{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := hideMounts(dir); err != nil {
			return err
		}
		if storedRoot {
			root, err := u.c.openRoot(s.Root.Path)
			if err != nil {
				return err
			}
			s.Root.Path = filepath.Join(dir, "rootfs")
			err = bind(root, s.Root.Path, nil)
			_ = root.Close()
			if err != nil {
				return fmt.Errorf("mount the root filesystem: %w", err)
			}
		}
		for _, i := range stored {
			from := s.Mounts[i].Source
			rel, _ := u.c.set.stored(from)
			f, err := u.c.set.openStored(rel)
			if err != nil {
				return fmt.Errorf("mount on %s: %w", s.Mounts[i].Destination, err)
			}
			owners := users
			if rel[0] != "volumes" {
				owners = nil
			}
			s.Mounts[i].Source = filepath.Join(dir, fmt.Sprint(i))
			err = bind(f, s.Mounts[i].Source, owners)
			_ = f.Close()
			if err != nil {
				return fmt.Errorf("mount %s on %s: %w", from, s.Mounts[i].Destination, err)
			}
		}
		for _, j := range u.joined {
			n := &s.Linux.Namespaces[j.index]
			n.Path = filepath.Join(dir, string(n.Type))
			if err := bind(j.namespace, n.Path, nil); err != nil {
				return fmt.Errorf("mount the %s namespace of another container: %w", n.Type, err)
			}
		}
		var err error
		if m.namespace, err = os.Open("/proc/thread-self/ns/mnt"); err == nil {
			m.root, err = os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
		}
		return err
	})
	u.mounts = m
	return err
}

// openRoot opens the root filesystem that the configuration names: the container's own, another one in the store, or
// any directory of the host.
func (c *Container) openRoot(path string) (*os.File, error) {
	parts, ok := c.set.stored(path)
	switch {
	case !ok:
		return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	case filepath.Join(parts...) == c.rel("rootfs"):
		return c.OpenRoot()
	}
	return c.set.openStored(parts)
}

// run calls f in the mount namespace. Processes that f starts are in it too. If m is nil, it just calls f.
func (m *privateMounts) run(f func() error) error {
	if m == nil {
		return f()
	}
	return onThread(func() error {
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(m.namespace.Fd()), unix.CLONE_NEWNS)
		}
		if err == nil {
			err = unix.Fchdir(int(m.root.Fd()))
		}
		if err == nil {
			err = unix.Chroot(".")
		}
		if err != nil {
			return fmt.Errorf("enter the mount namespace: %w", err)
		}
		return f()
	})
}

// close closes the namespace, which then lives as long as the runtime's processes. m may be nil.
func (m *privateMounts) close() {
	if m != nil {
		_ = m.namespace.Close()
		_ = m.root.Close()
	}
}

// files returns the descriptors that a shim inherits.
func (m *privateMounts) files() (namespace, root *os.File) {
	if m == nil {
		return nil, nil
	}
	return m.namespace, m.root
}

// onThread calls f on a thread that ends afterwards, so that f may change per-thread state of the kernel. It does not
// use the first thread: /proc/self shows the mounts of that one.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// hideMounts keeps mounts that this thread makes below dir out of other mount namespaces. Mounts made there still
// appear here.
func hideMounts(dir string) error {
	at := dir
	for !mounted(at) && at != "/" {
		at = filepath.Dir(at)
	}
	if err := sys.Mount("", at, "", unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("hide mounts below %s: %w", at, err)
	}
	return nil
}

// bind mounts an open file or directory, with the mounts in it, on target, which it creates. users is as in
// mountPrivately.
func bind(f *os.File, target string, users *os.File) error {
	fi, err := f.Stat()
	if err == nil && fi.IsDir() {
		err = os.Mkdir(target, 0o700)
	} else if err == nil {
		err = os.WriteFile(target, nil, 0o600)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if users == nil {
		if err := sys.Mount(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		return sys.Mount("", target, "", unix.MS_PRIVATE|unix.MS_REC, "")
	}
	fd, err := sys.OpenTree(int(f.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Propagation: unix.MS_PRIVATE, Userns_fd: uint64(users.Fd())}
		err = sys.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr)
	}
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		return errclass.Errorf(errdefs.ErrNotImplemented, "owners can't be mapped: its file system or the kernel has no ID-mapped mounts")
	}
	if err == nil {
		err = sys.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	return err
}

// OpenDir opens the container's directory: the one that its record is sealed for, whatever is at its path now.
// FailedPrecondition: another directory is at its path.
func (c *Container) OpenDir() (*os.File, error) {
	d, err := c.set.openStored(strings.Split(c.rel(), "/"))
	if err != nil {
		return nil, err
	}
	id, err := identifyAt(int(d.Fd()), "")
	if err == nil && !c.isSealedIn(id) {
		err = failed("%s is not the container's directory any more", c.dir)
	}
	if err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

// openRootfs opens the directory of the container's root filesystem. If a snapshot is mounted there, it opens the
// mount.
func (c *Container) openRootfs() (*os.File, error) {
	d, err := c.OpenDir()
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return disk.Tree(procPath(d)).OpenDir("rootfs")
}

// OpenRoot opens the root of the container's root filesystem. FailedPrecondition: its snapshot is not mounted.
func (c *Container) OpenRoot() (*os.File, error) {
	root, err := c.openRootfs()
	if err == nil && c.Snapshot != nil && !mountedAt(int(root.Fd()), "") {
		_ = root.Close()
		return nil, failed("its snapshot is not mounted on %s", c.path("rootfs"))
	}
	return root, err
}

// procPath returns a path of an open directory that always leads to that directory, in this process and its children.
func procPath(d *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), d.Fd()) }

// stored returns the components of a path relative to the store, if the path is that of a volume or of a file in a
// container's directory.
func (s *Containers) stored(path string) (parts []string, ok bool) {
	rel, err := filepath.Rel(s.root, path)
	parts = strings.Split(rel, "/")
	return parts, err == nil && (parts[0] == "volumes" && len(parts) == 3 || parts[0] == "containers" && len(parts) == 4)
}

// openStored opens a directory or regular file whose components stored has returned. FailedPrecondition: it is a
// symbolic link, or anybody except this user and root could have put something into a directory above it.
func (s *Containers) openStored(parts []string) (*os.File, error) {
	at, above := s.tree(), parts[:len(parts)-1]
	var d *os.File
	defer func() { _ = d.Close() }() // fails for nil
	for i, name := range above {
		path := s.tree().Path(filepath.Join(parts[:i+1]...))
		next, err := at.OpenDir(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, disk.Cause(err))
		}
		_ = d.Close()
		d, at = next, disk.Tree(fmt.Sprintf("/proc/self/fd/%d", next.Fd()))
		fi, err := disk.StatAt(d, ".")
		if err == nil {
			err = checkDir(path, fi)
		}
		if err != nil {
			return nil, err
		}
	}
	name := parts[len(above)]
	open := at.OpenDir
	if fi, err := disk.StatAt(d, name); err == nil && fi.Mode().IsRegular() {
		open = at.Open
	}
	f, err := open(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.tree().Path(filepath.Join(parts...)), disk.Cause(err))
	}
	return f, nil
}
