//go:build !linux

package disk

import "os"

// StartWriteback does nothing: the system decides when to write.
func StartWriteback(*os.File, int64, int64) {}
