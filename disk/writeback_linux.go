package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// StartWriteback has the kernel begin to write a range of a file to the disk, so that a later sync has less to wait for. It makes
// nothing durable, and an error is one that the sync reports too.
func StartWriteback(f *os.File, offset, length int64) {
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), offset, length, unix.SYNC_FILE_RANGE_WRITE) })
	}
}
