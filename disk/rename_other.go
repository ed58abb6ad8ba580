//go:build !linux

package disk

import "golang.org/x/sys/unix"

func renameNew(int, string, int, string) error { return unix.ENOTSUP }
