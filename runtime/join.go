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

// namespaceFiles are the names below /proc/PID/ns of the namespaces that a container can have of another one.
var namespaceFiles = map[specs.LinuxNamespaceType]string{
	specs.PIDNamespace: "pid", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.NetworkNamespace: "net",
}

// openNamespace opens a namespace of a container that runs. The descriptor keeps the namespace, and names no other one, whatever
// becomes of the container. The error is NotFound if there is no such container, and FailedPrecondition if it does not run.
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
	// While it lives its number is no other's, so the file was its own.
	if !l.state.Alive() {
		_ = f.Close() // nil is none
		return nil, failed("container %s has just ended", id)
	}
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		err = errclass.As(err, errdefs.ErrPermissionDenied)
	}
	return f, err
}

// joined is an open namespace of another container, and its place in the configuration.
type joined struct {
	index     int
	namespace *os.File
}

// join opens the namespaces of other containers.
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

// closeJoined closes what join has opened.
func (u *execution) closeJoined() {
	for _, j := range u.joined {
		_ = j.namespace.Close()
	}
	u.joined = nil
}

// checkEnds returns an error if what the container leaves in another's PID namespace could not be told from the processes of that,
// and ended with the container.
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

// Shared returns what a container that joins this one's network finds names by: the host name, and the mounts of the files.
func (c *Container) Shared() (hostname string, files []specs.Mount, err error) {
	b, err := openBundleConfig(c.BundleDir(), c.BundleDir())
	if err != nil {
		return "", nil, err
	}
	for _, m := range b.spec.Mounts {
		if m.Type == "bind" && slices.Contains(spec.NameFiles, m.Destination) {
			m.Source = b.inBundle(m.Source)
			files = append(files, m)
		}
	}
	return b.spec.Hostname, files, nil
}
