package runtime

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const aclName = "system.posix_acl_access"

// Tags of entries in an access control list, as the kernel's posix_acl_xattr.h has them.
const (
	aclOwner = 0x01
	aclUser  = 0x02
	aclGroup = 0x04
	aclMask  = 0x10
	aclOther = 0x20
)

// searchList returns the access control list of a directory of mode 0700 that these users may search, besides its
// owner.
func searchList(users []uint32) []byte {
	const none, search, all = 0, 1, 7
	b := binary.LittleEndian.AppendUint32(nil, 2) // version
	entry := func(tag, perm uint16, id uint32) {
		b = binary.LittleEndian.AppendUint16(b, tag)
		b = binary.LittleEndian.AppendUint16(b, perm)
		b = binary.LittleEndian.AppendUint32(b, id)
	}
	const nobody = ^uint32(0)
	entry(aclOwner, all, nobody)
	for _, u := range users {
		entry(aclUser, search, u)
	}
	entry(aclGroup, none, nobody)
	entry(aclMask, search, nobody)
	entry(aclOther, none, nobody)
	return b
}

// listed returns the users of a [searchList]. ok is false for any other list.
func listed(list []byte) (users []uint32, ok bool) {
	if len(list) < 4 {
		return nil, false
	}
	for b := list[4:]; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint16(b) == aclUser {
			users = append(users, binary.LittleEndian.Uint32(b[4:]))
		}
	}
	return users, slices.Equal(list, searchList(users))
}

// searchers returns the users who may search a directory because of a [searchList].
func searchers(dir string) (users []uint32, ok bool) {
	list := make([]byte, 64<<10)
	n, err := unix.Lgetxattr(dir, aclName, list)
	if err != nil {
		return nil, false
	}
	return listed(list[:n])
}

// letSearch lets the root of a container's user namespace search directories of this user's. All other users stay out.
func letSearch(linux *specs.Linux, dirs ...string) error {
	if linux == nil {
		return nil
	}
	for _, m := range linux.UIDMappings {
		if m.ContainerID != 0 || m.Size == 0 || m.HostID == 0 {
			continue
		}
		for _, dir := range dirs {
			users, ok := searchers(dir)
			if !slices.Contains(users, m.HostID) {
				users, ok = append(users, m.HostID), false
			}
			if ok { // it is false if a chmod of the directory has put them out
				continue
			}
			slices.Sort(users)
			if err := unix.Lsetxattr(dir, aclName, searchList(users), 0); err != nil {
				if errors.Is(err, unix.ENOTSUP) {
					return failed("root of the container's user namespace can't be let into %s: the file system has no access control lists", dir)
				}
				return &fs.PathError{Op: "setxattr", Path: dir, Err: err}
			}
		}
	}
	return nil
}
