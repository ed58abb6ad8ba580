package spec

import (
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// UserNS selects a container's user namespace. The zero value means the caller's, anything else a new one.
type UserNS struct {
	Auto bool                   // map IDs 0 to AutoUsers-1; the host's IDs are chosen when the container is run
	Map  []specs.LinuxIDMapping // the same for users and groups
}

// AutoUsers is the number of IDs of a container whose IDs on the host are chosen automatically: enough for Debian's
// users.
const AutoUsers = 1 << 16

// maxIDMap is the kernel's UID_GID_MAP_MAX_EXTENTS.
const maxIDMap = 340

// ParseUserNS parses --userns: host or "", auto, or a list of CONTAINER:HOST:SIZE separated by commas.
func ParseUserNS(s string) (u UserNS, err error) {
	switch s {
	case "", hostNamespace:
		return u, nil
	case AutoUserNS:
		u.Auto = true
		return u, nil
	}
	for _, part := range strings.Split(s, ",") {
		var ids [3]uint32
		f := strings.Split(part, ":")
		for i, v := range f {
			n, perr := strconv.ParseUint(v, 10, 32)
			if perr != nil || len(f) != 3 {
				return u, invalid("user namespace %q is not auto, host or CONTAINER:HOST:SIZE[,…]", s)
			}
			ids[i] = uint32(n)
		}
		if len(f) != 3 || len(u.Map) == maxIDMap {
			return u, invalid("user namespace %.60q: want CONTAINER:HOST:SIZE, %d times at most", s, maxIDMap)
		}
		u.Map = append(u.Map, specs.LinuxIDMapping{ContainerID: ids[0], HostID: ids[1], Size: ids[2]})
	}
	return u, CheckIDMap(u.Map)
}

// AutoUserNS is the value of --userns that has the IDs chosen automatically.
const AutoUserNS = "auto"

// CheckIDMap returns InvalidArgument if the kernel would refuse the map, or if ID 0 is not mapped.
func CheckIDMap(maps []specs.LinuxIDMapping) error {
	root := false
	for i, m := range maps {
		// The largest number is not a valid ID.
		if m.Size == 0 || uint64(m.ContainerID)+uint64(m.Size) > 1<<32-1 || uint64(m.HostID)+uint64(m.Size) > 1<<32-1 {
			return invalid("IDs %d:%d:%d: a size of 0, or beyond the largest ID", m.ContainerID, m.HostID, m.Size)
		}
		for _, o := range maps[:i] {
			if overlap(m.ContainerID, o.ContainerID, m.Size, o.Size) || overlap(m.HostID, o.HostID, m.Size, o.Size) {
				return invalid("IDs %d:%d:%d and %d:%d:%d overlap", o.ContainerID, o.HostID, o.Size, m.ContainerID, m.HostID, m.Size)
			}
		}
		root = root || m.ContainerID == 0
	}
	if !root || len(maps) > maxIDMap {
		return invalid("a user namespace needs a root, ID 0, and %d ranges at most", maxIDMap)
	}
	return nil
}

func overlap(a, b, sizeA, sizeB uint32) bool {
	return uint64(a) < uint64(b)+uint64(sizeB) && uint64(b) < uint64(a)+uint64(sizeA)
}

// Own reports whether the container has its own user namespace.
func (u UserNS) Own() bool { return u.Auto || len(u.Map) > 0 }

// has reports whether an ID of the container is mapped.
func (u UserNS) has(id uint32) bool {
	if !u.Own() || u.Auto && id < AutoUsers {
		return true
	}
	for _, m := range u.Map {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			return true
		}
	}
	return false
}

// separate gives the container its own user namespace. Root there has no rights over namespaces of the host or of
// containers in other user namespaces, so the container must not use any of these. Docker refuses them too.
func (o *Options) separate(s *specs.Spec) error {
	if !o.UserNS.Own() {
		return nil
	}
	for what, of := range map[string]Sharing{"PID": o.PID, "IPC": o.IPC, "UTS": o.UTS, "network": Sharing(o.Network)} {
		if !of.own() && (what != "network" || !strings.Contains(o.Network, "/")) {
			return invalid("a user namespace of its own doesn't go with the %s namespace %s", what, of)
		}
	}
	if o.Privileged {
		return invalid("a user namespace of its own doesn't go with every privilege on the host")
	}
	for _, id := range append([]uint32{s.Process.User.UID, s.Process.User.GID}, s.Process.User.AdditionalGids...) {
		if !o.UserNS.has(id) {
			return invalid("user or group %d is not in the container's user namespace", id)
		}
	}
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings, s.Linux.GIDMappings = o.UserNS.Map, o.UserNS.Map
	return nil
}
