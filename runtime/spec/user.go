package spec

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Limits on what is read from an image's etc/passwd and etc/group.
const (
	maxUserFile = 16 << 20
	maxUserLine = 1 << 20
	maxGroups   = 65536 // the kernel's NGROUPS_MAX
)

// User resolves a user in the form of an image configuration or docker's --user: user, uid, user:group, uid:gid and so
// on; "" means root. Like docker, it adds the user's supplementary groups only if no group is given.
//
// Names are looked up in etc/passwd and etc/group below rootfs. These are not trusted: the kernel confines the look-up
// to rootfs. Numeric IDs need no look-up, and root is 0 unless a file says otherwise. For these, an invalid file, such
// as a FIFO, counts as empty.
//
// Without a rootfs (""), only numbers and root are resolved, and home is "". InvalidArgument: another name without a
// rootfs. NotFound: an unknown name.
func User(rootfs, user string) (u specs.User, home string, err error) {
	name, group, hasGroup := strings.Cut(user, ":")
	if err := CheckText("user", user); err != nil {
		return u, "", err
	}
	uid, uidNumeric, err := number(name)
	if err != nil {
		return u, "", err
	}
	gid, gidNumeric, err := number(group)
	if err != nil {
		return u, "", err
	}
	if name == "" {
		uidNumeric = true
	}
	if hasGroup && group == "" {
		hasGroup = false
	}
	known := uidNumeric || name == "root"
	groupKnown := !hasGroup || gidNumeric || group == "root"
	if rootfs == "" {
		switch {
		case !known:
			return u, "", invalid("user %q is a name: give the --rootfs whose etc/passwd knows it", name)
		case !groupKnown:
			return u, "", invalid("group %q is a name: give the --rootfs whose etc/group knows it", group)
		}
		u.UID, u.GID, u.AdditionalGids = uid, gid, []uint32{gid}
		return u, "", nil
	}

	root, err := os.Open(rootfs)
	if err != nil {
		return u, "", fmt.Errorf("open rootfs: %w", err)
	}
	defer root.Close()
	e, found, err := lookupUser(root, name, uid, uidNumeric)
	if err != nil && !(known && errdefs.IsInvalidArgument(err)) {
		return u, "", err
	}
	if !found && !known {
		return u, "", notFound("user %q is not in the etc/passwd of %s", name, rootfs)
	}
	u.UID, u.GID = e.uid, gid
	if !hasGroup {
		u.GID = e.gid
	}
	if hasGroup && gidNumeric {
		u.AdditionalGids = []uint32{gid}
		return u, e.home, nil
	}

	var extra []uint32
	groupFound := false
	if hasGroup {
		var id uint32
		if id, groupFound, err = lookupGroup(root, group); groupFound {
			u.GID = id
		}
	} else {
		extra, err = groupsOf(root, e.name, u.GID)
	}
	switch {
	case err != nil && !(known && groupKnown && errdefs.IsInvalidArgument(err)):
		return u, "", err
	case len(extra) >= maxGroups:
		return u, "", invalid("user %q is in more than %d groups", e.name, maxGroups)
	case !groupFound && !groupKnown:
		return u, "", notFound("group %q is not in the etc/group of %s", group, rootfs)
	}
	// As in docker, the primary group is also a supplementary one. Otherwise a process that drops its group could gain
	// access that was denied to the group (CVE-2022-36109).
	u.AdditionalGids = append([]uint32{u.GID}, extra...)
	return u, e.home, nil
}

// userEntry is what etc/passwd says about a user.
type userEntry struct {
	name     string // "" for a user without an entry
	uid, gid uint32
	home     string
}

// lookupUser looks a user up in etc/passwd, by uid if isUID is true, else by name. A user without an entry has the home
// directory "/".
func lookupUser(root *os.File, name string, uid uint32, isUID bool) (e userEntry, found bool, err error) {
	e = userEntry{uid: uid, home: "/"}
	err = userLines(root, "etc/passwd", func(f []string) bool {
		if len(f) < 6 {
			return true
		}
		id, ok := numeric(f[2])
		if !ok || isUID && id != uid || !isUID && f[0] != name {
			return true
		}
		found, e.uid, e.name = true, id, f[0]
		if g, ok := numeric(f[3]); ok {
			e.gid = g
		}
		if path.IsAbs(f[5]) && CheckText("home", f[5]) == nil {
			e.home = f[5]
		}
		return false
	})
	return e, found, err
}

// lookupGroup looks the ID of a group up in etc/group.
func lookupGroup(root *os.File, name string) (id uint32, found bool, err error) {
	err = userLines(root, "etc/group", func(f []string) bool {
		if len(f) >= 3 && f[0] == name {
			id, found = numeric(f[2])
		}
		return !found
	})
	return id, found, err
}

// groupsOf returns up to maxGroups groups of a user, by etc/group, without the primary one. A user "" is in no groups.
func groupsOf(root *os.File, user string, primary uint32) (all []uint32, err error) {
	err = userLines(root, "etc/group", func(f []string) bool {
		if len(f) < 4 || user == "" || !slices.Contains(strings.Split(f[3], ","), user) {
			return true
		}
		if id, ok := numeric(f[2]); ok && id != primary && !slices.Contains(all, id) {
			all = append(all, id)
		}
		return len(all) < maxGroups
	})
	return all, err
}

// addGroups adds groups, by name or number, to have. Names are looked up as in [User].
func addGroups(rootfs string, have []uint32, add []string) ([]uint32, error) {
	for _, g := range add {
		if g == "" {
			return nil, invalid("an added group has no name")
		}
		u, _, err := User(rootfs, "0:"+g)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(have, u.GID) {
			have = append(have, u.GID)
		}
	}
	if len(have) > maxGroups {
		return nil, invalid("a process can't be in more than %d groups", maxGroups)
	}
	return have, nil
}

// number parses an ID given by the caller or the image. "" is 0, and not numeric.
func number(s string) (uint32, bool, error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false, nil
	}
	n, ok := numeric(s)
	if !ok {
		return 0, false, invalid("user or group %s is out of range", s)
	}
	return n, true, nil
}

// numeric parses a user or group ID. The largest number is excluded: the kernel takes it for "no ID".
func numeric(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// userLines calls f with the fields of each line of a file below root, until f returns false. A missing file has no
// lines. A file that is not regular, or is too large, is InvalidArgument.
func userLines(root *os.File, name string, f func(fields []string) bool) error {
	file, err := OpenInRoot(root, name)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		return invalid("%s in %s can't be followed: %v", name, root.Name(), err)
	}
	if err != nil {
		return fmt.Errorf("open %s in %s: %w", name, root.Name(), err)
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return fmt.Errorf("open %s in %s: %w", name, root.Name(), err)
	case !info.Mode().IsRegular():
		return invalid("%s in %s is not a regular file", name, root.Name())
	case info.Size() > maxUserFile:
		return invalid("%s in %s is larger than %d bytes", name, root.Name(), maxUserFile)
	}
	// O_PATH does not open the file, so a device or FIFO of the image is never opened.
	file, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", file.Fd()))
	if err != nil {
		return fmt.Errorf("open %s in %s: %w", name, root.Name(), err)
	}
	defer file.Close()
	lines := bufio.NewScanner(io.LimitReader(file, maxUserFile))
	lines.Buffer(nil, maxUserLine)
	for lines.Scan() {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if !f(strings.Split(string(line), ":")) {
			return nil
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return invalid("%s in %s has a line longer than %d bytes", name, root.Name(), maxUserLine)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read %s in %s: %w", name, root.Name(), err)
	}
	return nil
}

// OpenInRoot resolves a path with root as the root directory, also for symbolic links, and returns an O_PATH
// descriptor.
func OpenInRoot(root *os.File, name string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(int(root.Fd()), name, &how)
		// EAGAIN: a rename elsewhere while ".." was resolved (openat2(2)).
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}
