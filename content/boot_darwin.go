package content

import "golang.org/x/sys/unix"

// bootID identifies the current boot: see boot_linux.go.
func bootID() string {
	id, err := unix.Sysctl("kern.bootsessionuuid")
	if err != nil {
		return ""
	}
	return id
}
