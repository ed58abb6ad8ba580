package runtime

import (
	"errors"
	"fmt"
	"os"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// UserNamespace opens the user namespace that the container's processes were started from. Programs that work on them
// must be in it. It returns nil if that is this process's own, or if the container has no process.
func (c *Container) UserNamespace() (*os.File, error) {
	l, err := c.proc("").look()
	if err != nil || l.state == nil {
		return nil, err
	}
	if l.monitored {
		return foreignUserNamespace(l.state.Monitor, false)
	}
	if l.runs() {
		return foreignUserNamespace(l.state.HostProcess, c.HasUserNamespace())
	}
	return nil, nil
}

// HasUserNamespace reports whether the container's configuration gives it its own user namespace. It returns false if
// the configuration can't be read.
func (c *Container) HasUserNamespace() bool {
	b, err := c.openConfig()
	return err == nil && b.hasUserNamespace()
}

// BundleHasUserNamespace is [Container.HasUserNamespace] for a bundle.
func BundleHasUserNamespace(dir string) bool {
	b, err := openBundleConfig(dir, dir)
	return err == nil && b.hasUserNamespace()
}

func (b *bundle) hasUserNamespace() bool {
	return b.spec.Linux != nil && slices.ContainsFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.UserNamespace
	})
}

func foreignUserNamespace(p HostProcess, above bool) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid))
	if err == nil && above {
		var fd int
		if fd, err = unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_PARENT); err == nil {
			_ = f.Close()
			f = os.NewFile(uintptr(fd), "parent of "+f.Name())
		}
	}
	if f == nil || err != nil || !p.Alive() {
		_ = f.Close()
		if errors.Is(err, unix.EPERM) || errors.Is(err, os.ErrNotExist) || err == nil {
			return nil, nil // the process has ended, or its namespace is an ancestor of ours
		}
		return nil, err
	}
	var theirs, ours unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &theirs), unix.Stat("/proc/self/ns/user", &ours)); err != nil || theirs.Ino == ours.Ino {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
