package content

import (
	"os"
	"strings"
)

// bootID names this run of the kernel. What was written under another one may be lost in
// part, so nothing that was remembered of it is believed.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
