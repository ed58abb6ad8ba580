package sys

import "golang.org/x/sys/unix"

// Capable reports whether this process has a capability, such as unix.CAP_CHOWN, in its user namespace. Root in a
// container often lacks some.
func Capable(capability uint) bool {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&head, &sets[0]) == nil && sets[capability/32].Effective&(1<<(capability%32)) != 0
}
