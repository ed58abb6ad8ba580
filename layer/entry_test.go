package layer

import (
	"fmt"
	"testing"
)

// Several records can name one attribute, escaped differently. Xattrs returns it once, and always with the same value.
func TestXattrsOfOneName(t *testing.T) {
	t.Parallel()
	records := map[string]string{
		"SCHILY.xattr.user.a%": "2", "SCHILY.xattr.user.a%25": "1", "SCHILY.xattr.user.b": "3",
		"LIBARCHIVE.xattr.user.c": "Mg", "LIBARCHIVE.xattr.user.%63": "MQ", "LIBARCHIVE.xattr.user.b": "MQ",
	}
	for range 20 {
		list, err := Xattrs(records)
		if got := fmt.Sprintf("%s %v", list, err); got != "[{user.a% 1} {user.b 3} {user.c 1}] <nil>" {
			t.Fatal(got)
		}
	}
}
