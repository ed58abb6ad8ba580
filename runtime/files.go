package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Files gives access to a container's root directory during [Container.Files].
type Files struct {
	Root *os.File
	// Users is the container's user namespace, or nil if that is this process's. Files for the container must be made
	// by a process in that namespace, so that their owners are mapped.
	Users *os.File
}

// Files calls f with the container's root directory. While the container runs, that is the directory as its process
// sees it, with all mounts. Otherwise it is only the root filesystem, and the container can be neither started nor
// removed until f returns. The files are not trusted: paths must be resolved with the directory as the root.
// FailedPrecondition: the container has no root filesystem, or it does not run and was not made by this user.
func (c *Container) Files(ctx context.Context, f func(Files) error) error {
	p := c.proc("")
	l, err := p.look()
	if err == nil && l.status == Creating {
		l, err = p.live()
	}
	if err != nil {
		return err
	}
	if l.runs() {
		return l.files(p, f)
	}
	lock, err := p.takeLock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := c.CheckOwn(); err != nil {
		return err
	}
	if l, err = p.look(); err != nil {
		return err
	}
	if l.runs() { // it was running, and its monitor was killed
		return l.files(p, f)
	}
	return c.stoppedFiles(ctx, f)
}

// files is Files for a running container.
func (l looked) files(p *Process, f func(Files) error) error {
	proc := fmt.Sprintf("/proc/%d/", l.state.Pid)
	root, err := os.OpenFile(proc+"root", os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil && l.state.Alive() {
		return fmt.Errorf("%s: root directory: %w", p, err)
	}
	files := Files{Root: root}
	if err == nil {
		defer root.Close()
		if files.Users, err = foreignUserNamespace(l.state.HostProcess, false); err != nil {
			return fmt.Errorf("%s: user namespace: %w", p, err)
		}
		defer files.Users.Close()
	}
	if err != nil || !l.state.Alive() { // otherwise these may be another process's
		return failed("%s has just ended", p)
	}
	return f(files)
}

// stoppedFiles is Files for a container that does not run and that the caller has locked.
func (c *Container) stoppedFiles(ctx context.Context, f func(Files) error) (err error) {
	if c.Users != "" {
		// A killed run may have left its mount, whose owners are mapped by a user namespace that is gone.
		if err := c.UnmountRoot(); err != nil {
			return err
		}
	}
	var root *os.File
	if c.Snapshot != nil {
		if root, err = c.OpenRoot(); err != nil {
			root, err = c.MountRoot(ctx)
			defer func() { err = errors.Join(err, c.UnmountRoot()) }()
		}
	} else {
		var b *bundle
		if b, err = c.openConfig(); err == nil {
			root, err = c.openRoot(b.inBundle(filepath.Clean(b.spec.Root.Path)))
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return failed("container %s: root filesystem: %w", c.ID, err)
	case err != nil:
		return fmt.Errorf("container %s: root filesystem: %w", c.ID, err)
	}
	defer root.Close()
	return f(Files{Root: root})
}
