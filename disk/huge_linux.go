package disk

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugeFrom is the size in bytes from which memory is asked for in large pages: to fault in and clear small ones takes as long as
// reading a file into them does.
const hugeFrom = 4 << 20

// inLargePages asks the kernel to back memory that was not used yet by large pages.
func inLargePages(b []byte) {
	b = b[:cap(b)]
	if len(b) < hugeFrom {
		return
	}
	page := os.Getpagesize()
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (page - 1)
	_ = unix.Madvise(b[skip:len(b)-(len(b)-skip)%page], unix.MADV_HUGEPAGE) // a hint
}
