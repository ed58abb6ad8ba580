package layout

import (
	"context"
	"fmt"
	"os"
	"time"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// The files of a hold: distkit-layout(5), HOLDS.
const (
	Hold = "hold"
	Gate = "gate"
)

// holdSizes bounds the size of the file hold, which counts its holders.
const holdSizes = 4096

// OpenHold opens the file hold or gate, and creates it if it isn't there. It may be open for reading alone: see [disk.Tree.OpenLock].
func OpenHold(tree disk.Tree, name string) (*os.File, error) { return openLock(tree, name) }

// Share takes the store's shared lock against the sweep for a change that a sweep must not miss, such as of what a
// container pins. It waits for a sweep that works, not for one that waits. Whoever brings in blobs takes the lock of
// [content.Store.Hold], which lets a waiting sweep go first.
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

// Announce changes the size of the file hold, which the caller has locked, so that a sweep sees that somebody held the
// store. It takes no block of a full disk, and doesn't depend on the clock. A user who may not write to the file has
// nothing to announce: see [Holders.Blind].
func Announce(hold *os.File) {
	if fi, err := hold.Stat(); err == nil {
		_ = hold.Truncate((fi.Size() + 1) % holdSizes)
	}
}

// Holders tells apart who has held a store: it differs from an earlier value if somebody took the hold in between.
type Holders struct {
	size    int64
	changed time.Time
	// Blind is true if the file can't be written to by the user who asks. Others may not be able to announce
	// themselves then.
	Blind bool
}

// HoldersOf returns the holders so far by the open file hold.
func HoldersOf(hold *os.File) (Holders, error) {
	fi, err := hold.Stat()
	if err != nil {
		return Holders{}, err
	}
	mode, err := unix.FcntlInt(hold.Fd(), unix.F_GETFL, 0)
	return Holders{fi.Size(), fi.ModTime(), mode&unix.O_ACCMODE == unix.O_RDONLY}, err
}
