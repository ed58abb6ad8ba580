//go:build !linux

package disk

import "syscall"

// WidenPipe does nothing: pipes have the size that the system gives them.
func WidenPipe(syscall.Conn) {}
