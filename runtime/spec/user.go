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

// Bounds of what is read from an image's own etc/passwd and etc/group.
const (
	maxUserFile = 16 << 20
	maxUserLine = 1 << 20
	maxGroups   = 65536 // the kernel's NGROUPS_MAX
)

// User resolves a user as an image configuration or docker's --user names it: user, uid,
// user:group, uid:gid and so on; "" is root. Names are looked up in etc/passwd and etc/group
// below rootfs, which is not trusted: the kernel keeps the look-up inside. Numbers are taken
// as they are, and root is 0 where no file says otherwise: for them a file that can't be what it
// should be, a FIFO for example, is as good as none. Without a group the user's own groups are given
// too, as docker does; with one, that group alone.
//
// Without a rootfs ("") only numbers and root resolve, other names are InvalidArgument and home is "".
// An unknown name is NotFound.
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
	home, found := "/", false
	err = userLines(root, "etc/passwd", func(f []string) bool {
		if len(f) < 6 {
			return true
		}
		id, ok := numeric(f[2])
		if !ok || uidNumeric && id != uid || !uidNumeric && f[0] != name {
			return true
		}
		found, uid, name = true, id, f[0]
		if g, ok := numeric(f[3]); ok && !hasGroup {
			gid = g
		}
		if path.IsAbs(f[5]) && CheckText("home", f[5]) == nil {
			home = f[5]
		}
		return false
	})
	if err != nil && !(known && errdefs.IsInvalidArgument(err)) {
		return u, "", err
	}
	if !found && !known {
		return u, "", notFound("user %q is not in the etc/passwd of %s", name, rootfs)
	}
	u.UID, u.GID = uid, gid
	if hasGroup && gidNumeric {
		u.AdditionalGids = []uint32{gid}
		return u, home, nil
	}

	groupFound, overflow := false, false
	var extra []uint32
	err = userLines(root, "etc/group", func(f []string) bool {
		if len(f) < 3 {
			return true
		}
		id, ok := numeric(f[2])
		if !ok {
			return true
		}
		if hasGroup {
			if f[0] == group {
				u.GID, groupFound = id, true
			}
			return !groupFound
		}
		if found && len(f) > 3 && slices.Contains(strings.Split(f[3], ","), name) && !slices.Contains(extra, id) && id != u.GID {
			extra = append(extra, id)
		}
		overflow = len(extra) >= maxGroups
		return !overflow
	})
	switch {
	case err != nil && !(known && groupKnown && errdefs.IsInvalidArgument(err)):
		return u, "", err
	case overflow:
		return u, "", invalid("user %q is in more than %d groups", name, maxGroups)
	case !groupFound && !groupKnown:
		return u, "", notFound("group %q is not in the etc/group of %s", group, rootfs)
	}
	// The primary group is among the supplementary ones, as docker has it: a process that
	// drops its group must not gain access that was denied to the group (CVE-2022-36109).
	u.AdditionalGids = append([]uint32{u.GID}, extra...)
	return u, home, nil
}

// addGroups adds groups, by name or number, to those that a process has. Names are looked up as [User] does.
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

// number parses an ID given by the caller or the image; "" is 0 and not numeric.
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

// numeric parses a user or group ID; the largest is the kernel's "no ID".
func numeric(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// userLines calls f with the fields of each line of a file below root until it returns false.
// A file that isn't there has no lines; one of another kind or without measure is InvalidArgument.
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
	// O_PATH looked without touching: a device or a FIFO of the image is never opened.
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

// OpenInRoot looks a path up with root as the root directory, symbolic links included, and
// returns an O_PATH descriptor.
func OpenInRoot(root *os.File, name string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(int(root.Fd()), name, &how)
		// A rename elsewhere while ".." is walked asks for another try (openat2(2)).
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}
