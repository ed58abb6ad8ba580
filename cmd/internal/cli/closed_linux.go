package cli

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// closed says which standard streams were closed when the process began. The program's entry, entry, sets it:
// by the time that Go code runs, the runtime has opened /dev/null in their place, and an empty input or lost output would
// be success.
var closed [3]bool

// A closed stream becomes one that can't be used, here and in the programs that are started: reading
// or writing it fails as with a closed one, but no other file takes its place.
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
