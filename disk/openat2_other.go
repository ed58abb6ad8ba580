//go:build !linux

package disk

// openBeneath is for Linux alone.
func openBeneath(int, string) (fd int, ok bool) { return -1, false }
