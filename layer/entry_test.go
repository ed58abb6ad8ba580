package layer

import (
	"fmt"
	"strings"
	"testing"
	"unsafe"
)

// Several records can name one attribute, escaped differently. Xattrs returns the attribute once, and always with the
// same value.
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

// A record can be 1 MiB long, and the names in package tar's map are substrings of it. Names of attributes are kept for
// long, so they must be copies.
func TestXattrsAreCopies(t *testing.T) {
	t.Parallel()
	record := strings.Repeat("x", 1<<10) + "SCHILY.xattr.user.a LIBARCHIVE.xattr.user.b SCHILY.acl.default"
	records := map[string]string{}
	for k := range strings.FieldsSeq(record[1<<10:]) {
		records[k] = "MQ"
	}
	list, err := Xattrs(records)
	if err != nil || len(list) != 3 {
		t.Fatalf("%v: %v", list, err)
	}
	first := uintptr(unsafe.Pointer(unsafe.StringData(record)))
	for _, x := range list {
		if at := uintptr(unsafe.Pointer(unsafe.StringData(x.Name))); at >= first && at < first+uintptr(len(record)) {
			t.Errorf("%s is a part of the record", x.Name)
		}
	}
}
