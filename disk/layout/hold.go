package layout

import (
	"context"
	"fmt"
	"os"
	"time"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// The files of a hold (distkit-layout(5), HOLDS).
const (
	Hold = "hold"
	Gate = "gate"
)

// holdSizes is the number of sizes that the file hold goes through: each holder adds one, modulo holdSizes.
const holdSizes = 4096

// OpenHold opens the file hold or gate, and creates it if it doesn't exist. If this user may not write to it, it is
// opened for reading: see [disk.Tree.OpenLock].
func OpenHold(tree disk.Tree, name string) (*os.File, error) { return openLock(tree, name) }

// Share takes the store's shared lock against sweeps. It protects a change that a sweep must not miss, such as to what
// a container pins. It waits for a sweep that is running, but not for one that waits for its turn. A process that
// stores blobs uses [content.Store.Hold] instead, which lets a waiting sweep go first.
func Share(ctx context.Context, tree disk.Tree) (release func(), err error) {
	f, err := OpenHold(tree, Hold)
	if err == nil {
		err = disk.LockContext(ctx, f, unix.LOCK_SH)
	}
	if err != nil {
		return nil, fmt.Errorf("hold %s: %w", tree, err)
	}
	Announce(f)
	return func() { disk.Release(f) }, nil
}

// Announce changes the size of the file hold, which the caller has locked, so that a sweep sees that the store was
// held. The size needs no disk block, even on a full disk, and doesn't depend on the clock. A user who may not write to
// the file can't announce a hold: see [Holders.Blind].
func Announce(hold *os.File) {
	if fi, err := hold.Stat(); err == nil {
		_ = hold.Truncate((fi.Size() + 1) % holdSizes)
	}
}

// Holders is a state of the file hold. Two states differ if a process took and announced a hold between them.
type Holders struct {
	size    int64
	changed time.Time
	// Blind is true if this user can't write to the file hold. Other holders may then be unable to announce themselves,
	// so that two equal states prove nothing.
	Blind bool
}

// HoldersOf returns the current state of the open file hold.
func HoldersOf(hold *os.File) (Holders, error) {
	fi, err := hold.Stat()
	if err != nil {
		return Holders{}, err
	}
	mode, err := unix.FcntlInt(hold.Fd(), unix.F_GETFL, 0)
	return Holders{fi.Size(), fi.ModTime(), mode&unix.O_ACCMODE == unix.O_RDONLY}, err
}
