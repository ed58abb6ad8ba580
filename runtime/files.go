package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Files is a container's root directory while [Container.Files] runs.
type Files struct {
	Root *os.File
	// UIDs and GIDs map the container's numbers of users and groups to those that files have here, as "CONTAINER:FILE:SIZE"; they are
	// nil if both are the same.
	UIDs, GIDs []string
}

// Files calls f with the container's root directory: as its process sees it, with all that is mounted there, while it runs; otherwise
// its root filesystem alone, and nobody else starts or removes the container until f has ended. What is in it is the container's: paths
// must be looked up with it as the root. The error is FailedPrecondition if the container has no root filesystem, or does not run and is not this user's.
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
	if l.runs() { // it was started, and its monitor was killed
		return l.files(p, f)
	}
	return c.stoppedFiles(ctx, f)
}

// files is Files of a container that runs.
func (l looked) files(p *Process, f func(Files) error) error {
	proc := fmt.Sprintf("/proc/%d/", l.state.Pid)
	root, err := os.OpenFile(proc+"root", os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil && l.state.Alive() {
		return fmt.Errorf("%s: root directory: %w", p, err)
	}
	files := Files{Root: root}
	if err == nil {
		defer root.Close()
		files.UIDs, files.GIDs, err = idMaps(proc)
	}
	if err != nil || !l.state.Alive() { // else these were another process's
		return failed("%s has just ended", p)
	}
	return f(files)
}

// idMaps returns how the users and groups of a process's user namespace, given its directory of /proc, are seen from this process's.
func idMaps(proc string) (uids, gids []string, err error) {
	var theirs, ours unix.Stat_t
	if err := errors.Join(unix.Stat(proc+"ns/user", &theirs), unix.Stat("/proc/self/ns/user", &ours)); err != nil {
		return nil, nil, err
	}
	if theirs.Ino == ours.Ino {
		return nil, nil, nil
	}
	read := func(name string) (list []string, err error) {
		b, err := os.ReadFile(proc + name)
		for line := range strings.Lines(string(b)) {
			list = append(list, strings.Join(strings.Fields(line), ":"))
		}
		return list, err
	}
	if uids, err = read("uid_map"); err == nil {
		gids, err = read("gid_map")
	}
	return uids, gids, err
}

// stoppedFiles is Files of a container that does not run, which the caller has locked.
func (c *Container) stoppedFiles(ctx context.Context, f func(Files) error) (err error) {
	dir := c.path("rootfs")
	switch {
	case c.Snapshot != nil && !mounted(dir):
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := c.set.snapshots.Mount(ctx, *c.Snapshot, dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.unmount()) }()
	case c.Snapshot == nil:
		b, err := openBundleConfig(c.BundleDir(), c.BundleDir())
		if err != nil {
			return err
		}
		dir = b.inBundle(filepath.Clean(b.spec.Root.Path))
	}
	root, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return failed("container %s: root filesystem: %w", c.ID, err)
	}
	defer root.Close()
	return f(Files{Root: root})
}
