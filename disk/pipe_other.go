//go:build !linux

package disk

import "syscall"

// WidenPipe does nothing: pipes keep the system's default size.
func WidenPipe(syscall.Conn) {}
