package cli

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// closed records which standard streams were closed at the start of the process. The program's entry point sets it.
// When Go code runs it is too late: the Go runtime has opened /dev/null instead, and empty input or lost output would
// pass for success.
var closed [3]bool

// Replace each closed stream by one that can't be used, here and in child processes. Reading or writing it fails as if
// it were closed, but no other file gets its number.
func init() {
	for fd, was := range closed {
		if !was {
			continue
		}
		mode := unix.O_RDONLY
		if fd == 0 {
			mode = unix.O_WRONLY
		}
		null, err := unix.Open(os.DevNull, mode|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Dup3(null, fd, 0)
			_ = unix.Close(null)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "open %s for a closed stream: %v\n", os.DevNull, err)
			os.Exit(1)
		}
	}
}
