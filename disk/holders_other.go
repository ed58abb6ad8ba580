//go:build !linux

package disk

import "os"

// Holders returns no process: only Linux tells which process holds a lock.
func Holders(*os.File) []Process { return nil }
