// Package btrfs is the snapshot driver that keeps each snapshot as a subvolume. btrfs makes it from the parent's in
// constant time. The store must be on btrfs.
package btrfs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"distkit/snapshot"
	"distkit/snapshot/internal/tree"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Name is the driver's name.
const Name = "btrfs"

// Driver is the btrfs driver. A snapshot's directory has fs, a subvolume with the whole tree. That of a view with a
// parent is empty, since the view shows the parent's tree.
type Driver struct{ snapshot.WholeTrees }

var _ snapshot.Driver = Driver{}

func (Driver) Name() string      { return Name }
func (Driver) Init(string) error { return nil }
func (Driver) MaxParents() int   { return 0 }

func (Driver) Create(_ context.Context, t snapshot.Tree) error {
	if t.Kind != snapshot.View && len(t.Parents) > 0 {
		return snapshotSubvolume(t.ParentFS(), t.Dir)
	}
	if err := createSubvolume(t.Dir); err != nil {
		return err
	}
	return os.Chmod(t.FS(), 0o755) // whatever the umask is
}

// Usage counts the files that differ from the parent's. A btrfs snapshot keeps inode numbers, and every change to a
// file sets its change time.
func (Driver) Usage(ctx context.Context, t snapshot.Tree) (u snapshot.Usage, err error) {
	if t.Kind == snapshot.View || len(t.Parents) == 0 {
		u.Size, u.Inodes, err = tree.Usage(ctx, t.FS())
	} else {
		u.Size, u.Inodes, err = tree.UsageBeyond(ctx, t.FS(), t.ParentFS())
	}
	return u, err
}

func (Driver) Remove(_ context.Context, dir string) error {
	// This fails if the subvolume contains others, or if the user may only delete empty ones. Its files are then
	// deleted one by one.
	_ = destroySubvolume(dir)
	return tree.Remove(dir)
}

func (Driver) Check(ctx context.Context, dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("check btrfs: %w", err)
	}
	if st.Type != unix.BTRFS_SUPER_MAGIC {
		return errdefs.ErrNotImplemented.WithMessage("the store is not on btrfs")
	}
	scratch, err := os.MkdirTemp(dir, ".btrfs-")
	if err != nil {
		return fmt.Errorf("check btrfs: %w", err)
	}
	defer Driver{}.Remove(ctx, scratch)
	if err := createSubvolume(scratch); err != nil {
		return errdefs.ErrNotImplemented.WithMessage("btrfs doesn't work here: " + err.Error())
	}
	return nil
}

// From linux/btrfs.h.
const (
	iocSubvolCreate = 0x5000940e
	iocSnapDestroy  = 0x5000940f
	iocSnapCreateV2 = 0x50009417
)

type volArgs struct {
	fd   int64
	name [4088]byte
}

type volArgsV2 struct {
	fd             int64
	transid, flags uint64
	unused         [4]uint64
	name           [4040]byte
}

func createSubvolume(dir string) error {
	var a volArgs
	copy(a.name[:], "fs")
	return ioctl(dir, "create subvolume", iocSubvolCreate, unsafe.Pointer(&a))
}

func destroySubvolume(dir string) error {
	var a volArgs
	copy(a.name[:], "fs")
	return ioctl(dir, "delete subvolume", iocSnapDestroy, unsafe.Pointer(&a))
}

func snapshotSubvolume(from, dir string) error {
	src, err := snapshot.OpenFiles(from)
	if err != nil {
		return err
	}
	defer src.Close()
	a := volArgsV2{fd: int64(src.Fd())}
	copy(a.name[:], "fs")
	return ioctl(dir, "snapshot subvolume", iocSnapCreateV2, unsafe.Pointer(&a))
}

func ioctl(dir, what string, req uintptr, arg unsafe.Pointer) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), req, uintptr(arg)); errno != 0 {
		return &os.PathError{Op: what, Path: filepath.Join(dir, "fs"), Err: errno}
	}
	return nil
}
