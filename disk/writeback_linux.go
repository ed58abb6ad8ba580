package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// StartWriteback makes the kernel begin to write a range of a file to disk, so that a later sync has less to wait for.
// It makes nothing durable. The later sync reports any error.
func StartWriteback(f *os.File, offset, length int64) {
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.SyncFileRange(int(fd), offset, length, unix.SYNC_FILE_RANGE_WRITE) })
	}
}
