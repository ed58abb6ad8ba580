//go:build !linux

package disk

import "os"

// StartWriteback does nothing: the system writes when it sees fit.
func StartWriteback(*os.File, int64, int64) {}
