package sys

import (
	"os"
	"slices"
	"strings"
)

// InUserNamespace reports whether this process is in a user namespace other than the host's first one, where root is
// not root of the host.
func InUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && !slices.Equal(strings.Fields(string(b)), []string{"0", "0", "4294967295"})
}
