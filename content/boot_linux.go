package content

import (
	"os"
	"strings"
)

// bootID identifies the current boot, or is "" if that is unknown. A power failure may have lost unsynced data, so
// nothing saved under another boot ID is trusted.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
