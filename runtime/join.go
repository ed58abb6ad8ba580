package runtime

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"distkit/errclass"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// namespaceFiles maps the kinds of namespaces that containers can share to their names in /proc/PID/ns.
var namespaceFiles = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace: "pid", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.NetworkNamespace: "net",
}

// openNamespace opens a namespace of a running container. The descriptor keeps the namespace alive, and always stands
// for this one, whatever happens to the container. NotFound: there is no such container. FailedPrecondition: it is not
// running.
func (s *Containers) openNamespace(id string, kind specs.LinuxNamespaceType) (*os.File, error) {
	c, err := s.Get(id)
	if err == nil {
		err = c.CheckOwn()
	}
	if err != nil {
		return nil, err
	}
	l, err := c.proc("").live()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", l.state.Pid, namespaceFiles[kind]))
	// The process is alive, so its number was not reused when the file was opened.
	if !l.state.Alive() {
		_ = f.Close() // fails for nil
		return nil, failed("container %s has just ended", id)
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		err = errclass.Errorf(errdefs.ErrPermissionDenied, "it is in another user namespace, where only root of the host can join it")
	}
	return f, err
}

// joined is an open namespace of another container, and its place in the configuration.
type joined struct {
	index     int
	namespace *os.File
}

// join opens the namespaces of other containers that the configuration asks for.
func (u *execution) join(s *specs.Spec) error {
	if len(u.c.Namespaces) > 0 && u.images != "" {
		return failed("its processes were stored, and can't join the namespaces of other containers")
	}
	for _, kind := range slices.Sorted(maps.Keys(u.c.Namespaces)) {
		id := u.c.Namespaces[kind]
		i := -1
		if s.Linux != nil {
			i = slices.IndexFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
		}
		if i < 0 || namespaceFiles[kind] == "" {
			return failed("config.json has no %s namespace, which is that of container %s", kind, id)
		}
		f, err := u.c.set.openNamespace(id, kind)
		if err != nil {
			return fmt.Errorf("%s namespace of container %s: %w", kind, id, err)
		}
		u.joined = append(u.joined, joined{i, f})
	}
	return nil
}

// closeJoined closes the namespaces that join has opened.
func (u *execution) closeJoined() {
	for _, j := range u.joined {
		_ = j.namespace.Close()
	}
	u.joined = nil
}

// checkEnds returns an error if the container joins another's PID namespace, and nothing could distinguish and end the
// processes that it leaves there.
func checkEnds(s *specs.Spec, cgroups []string) error {
	if s.Linux == nil || len(cgroups) > 0 {
		return nil
	}
	for _, n := range s.Linux.Namespaces {
		if n.Type == specs.PIDNamespace && n.Path != "" {
			return errclass.Errorf(errdefs.ErrNotImplemented, "another's PID namespace can't be joined without a cgroup of its own, in which its processes are ended")
		}
	}
	return nil
}

// Shared returns what a container needs to resolve names in this one's network: the host name, and the mounts of the
// files. FailedPrecondition: another directory is at the container's path.
func (c *Container) Shared() (hostname string, files []specs.Mount, err error) {
	b, err := c.openConfig()
	if err != nil {
		return "", nil, err
	}
	for _, m := range b.spec.Mounts {
		if isBind(m) && slices.Contains(spec.NameFiles, m.Destination) {
			m.Source = b.inBundle(m.Source)
			files = append(files, m)
		}
	}
	return b.spec.Hostname, files, nil
}
