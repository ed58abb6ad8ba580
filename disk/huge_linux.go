package disk

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugeFrom is the buffer size in bytes from which large pages pay off. To fault in and clear small pages takes as long
// as to read a file into them.
const hugeFrom = 4 << 20

// inLargePages asks the kernel to back a new buffer, no page of which was used yet, with large pages.
func inLargePages(b []byte) {
	b = b[:cap(b)]
	if len(b) < hugeFrom {
		return
	}
	page := os.Getpagesize()
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (page - 1)
	_ = unix.Madvise(b[skip:len(b)-(len(b)-skip)%page], unix.MADV_HUGEPAGE) // only a hint: an error changes nothing
}
