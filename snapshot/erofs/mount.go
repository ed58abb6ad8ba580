package erofs

import (
	"errors"
	"fmt"
	"os"

	"distkit/disk/sys"
	"distkit/snapshot"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// procPath returns a path by which the kernel can open an open file again.
func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// attach mounts an EROFS image and the files with its data, detached from the tree of mounts. Linux 6.12 and later
// mount the files directly on most file systems, but not on tmpfs. Otherwise the files become loop devices, which
// disappear with the mount.
func attach(image *os.File, data []*os.File) (mount int, err error) {
	fd, err := attachFiles(image, data)
	// EINVAL and ELOOP: the file's file system is already stacked on two others.
	if !errors.Is(err, unix.ENOTBLK) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ELOOP) {
		return fd, err
	}
	var loops []*os.File
	defer func() {
		for _, l := range loops {
			l.Close()
		}
	}()
	for _, f := range append([]*os.File{image}, data...) {
		l, lerr := openLoop(f)
		if lerr != nil {
			return -1, fmt.Errorf("%w; %w", err, lerr)
		}
		loops = append(loops, l)
	}
	return attachFiles(loops[0], loops[1:])
}

func attachFiles(image *os.File, data []*os.File) (int, error) {
	fd, err := sys.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		return -1, errdefs.ErrNotImplemented.WithMessage("the kernel has no EROFS")
	case err != nil:
		return -1, snapshot.MountError("open EROFS", err)
	}
	defer unix.Close(fd)
	set := func(key string, f *os.File) {
		if err == nil {
			if err = sys.FsconfigSetString(fd, key, procPath(int(f.Fd()))); err != nil {
				err = snapshot.ContextError(fd, "mount EROFS image: "+key, err)
			}
		}
	}
	set("source", image)
	for _, f := range data {
		set("device", f)
	}
	if err == nil {
		err = sys.FsconfigSetFlag(fd, "ro")
	}
	if err != nil {
		return -1, err
	}
	if err := sys.FsconfigCreate(fd); err != nil {
		return -1, snapshot.ContextError(fd, "mount EROFS image", err)
	}
	m, err := sys.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	return m, snapshot.MountError("mount EROFS image", err)
}

// openLoop makes a read-only loop device of a file. The device disappears when nobody has it open or mounted.
func openLoop(f *os.File) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("loop device: find a free one: %w", err)
		}
		l, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("loop device: %w", err)
		}
		c := unix.LoopConfig{Fd: uint32(f.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(int(l.Fd()), &c); err == nil {
			return l, nil
		}
		l.Close()
		if !errors.Is(err, unix.EBUSY) { // another process has taken that device
			return nil, fmt.Errorf("loop device %d: %w", n, err)
		}
	}
}
