package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Snapshots mounts and removes root filesystems. Each method succeeds if its effect is there already. A target below
// /proc leads through an open directory, whatever is at its path by now.
type Snapshots interface {
	// Prepare makes the snapshot on a parent and mounts it. After an error it has done neither.
	Prepare(ctx context.Context, s Snapshot, parent, target string) error
	Mount(ctx context.Context, s Snapshot, target string) error
	// MountFor mounts the snapshot with owners mapped by a user namespace. The snapshot must not be mounted on target.
	MountFor(ctx context.Context, s Snapshot, target string, users *os.File) error
	Unmount(target string) error
	Remove(ctx context.Context, s Snapshot) error
}

// Networks connects containers to networks. Up connects a network until Down disconnects it. Remove removes it. Each
// succeeds if its effect is there already. If the network is gone, as after a boot, Up makes it again as c says; c is
// nil if that is unknown. Connection returns the request with which an existing network was made.
type Networks interface {
	Up(ctx context.Context, path string, c *Connection) error
	Connection(path string) (*Connection, error)
	Down(ctx context.Context, path string) error
	Remove(ctx context.Context, path string) error
}

// Containers gives access to the containers of a namespace of a store.
type Containers struct {
	root      string // absolute, without symbolic links
	namespace string
	state     string // the private directory for the state of runs, absolute
	snapshots Snapshots
	networks  Networks
}

// Open opens the containers of a namespace of the store at root, which need not exist. state is the directory for the
// state of runs; "" means [DefaultState]. A container is taken to run only if its state is there.
func Open(root, namespace, state string, s Snapshots, n Networks) (*Containers, error) {
	if err := CheckID(namespace); err != nil {
		return nil, fmt.Errorf("namespace: %w", err)
	}
	root, namespace, err := layout.Resolve(root, namespace)
	if err != nil {
		return nil, err
	}
	real, err := filepath.Abs(root)
	if err == nil {
		if r, rerr := filepath.EvalSymlinks(real); rerr == nil {
			real = r
		} else if !errors.Is(rerr, fs.ErrNotExist) {
			err = rerr
		}
	}
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", root, err)
	}
	if state == "" {
		state = DefaultState()
	}
	if state, err = filepath.Abs(state); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return &Containers{real, namespace, state, s, n}, nil
}

func (s *Containers) dir() string { return filepath.Join(s.root, "containers", s.namespace) }

// Container is a container: its directory, and its record as it was read.
type Container struct {
	Record
	dir    string
	set    *Containers
	unread bool // the record can't be read
	own    bool // this user made it on this host, by the record's seal

	restored bool // set by FromCheckpoint
}

// Dir returns the container's directory.
func (c *Container) Dir() string { return c.dir }

func (c *Container) path(names ...string) string {
	return filepath.Join(append([]string{c.dir}, names...)...)
}

// BundleDir returns the directory of the OCI bundle.
func (c *Container) BundleDir() string {
	if c.Bundle != "" {
		return c.Bundle
	}
	return c.dir
}

func (c *Container) key() string {
	k, _ := Key(c.Namespace, c.ID) // both names are valid
	return k
}

func (c *Container) log(e events.Event) {
	e.Namespace, e.Container = c.Namespace, c.ID
	events.Append(c.set.root, e)
}

// Create makes a container. Its directory claims the ID, and the record in it pins what the container uses.
// AlreadyExists: the ID has a container. But if that was to be removed at its end, and its run or its owner was killed,
// Create removes it first.
//
// If parent is not "", Create makes the record's snapshot on it and mounts it. NotFound: there is no such parent. Then
// Create calls complete, unless it is nil, to make the rest of the container's directory. If complete fails, or ctx is
// done by then, Create removes the container.
func (s *Containers) Create(ctx context.Context, r Record, parent string, complete func(*Container) error) (*Container, error) {
	c, lock, err := s.create(ctx, r, parent, complete)
	if err != nil {
		return nil, err
	}
	return c, lock.Close()
}

// create is Create, and returns the container locked.
func (s *Containers) create(ctx context.Context, r Record, parent string, complete func(*Container) error) (_ *Container, lock *os.File, err error) {
	if err := CheckID(r.ID); err != nil {
		return nil, nil, err
	}
	s.Clear(ctx)
	r.Namespace, r.Created = s.namespace, time.Now().UTC()
	c := &Container{Record: r, dir: filepath.Join(s.dir(), r.ID), set: s, own: true}
	err = s.secure("")
	if err == nil {
		lock, err = c.claim(ctx)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	err = func() error {
		// With the lock of the store, a concurrent sweep either sees the record and what it pins, or has ended before
		// the image and snapshot are looked up.
		release, err := layout.Share(ctx, disk.Tree(s.root))
		if err != nil {
			return err
		}
		defer release()
		if c.RemoveAtEnd {
			if err := c.markDue(); err != nil {
				return err
			}
		}
		if err := c.write(); err != nil {
			return err
		}
		atStep("written")
		if c.Bundle != "" {
			return nil
		}
		// Made here with mode 0600, so that a shell's redirection to it keeps that mode.
		f, err := s.tree().OpenFile(c.rel("config.json"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Chmod(0o600), f.Close()); err != nil {
			return err
		}
		atStep("configured")
		if err := s.tree().Mkdir(c.rel("rootfs"), 0o755); err != nil || parent == "" {
			return err
		}
		target, err := c.openRootfs()
		if err != nil {
			return err
		}
		defer target.Close()
		return s.snapshots.Prepare(ctx, *c.Snapshot, parent, procPath(target)+"/.")
	}()
	if err == nil && complete != nil {
		atStep("prepared")
		if err = complete(c); err == nil {
			err = ctx.Err()
		}
		atStep("completed")
		if err != nil {
			err = errors.Join(err, c.UnmountRoot(), c.removeResources(context.WithoutCancel(ctx)))
		}
	}
	if err != nil {
		_ = c.delete(lock)
		return nil, nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	e := events.Event{Topic: "/containers/create"}
	if c.Image != nil {
		e.Name, e.Digest = c.Image.Name, c.Image.Digest
	}
	if c.Snapshot != nil {
		e.Key, e.Snapshotter = c.Snapshot.Key, c.Snapshot.Driver
	}
	c.log(e)
	return c, lock, nil
}

// claim makes the container's directory with only a lock file, which it locks.
func (c *Container) claim(ctx context.Context) (*os.File, error) {
	for range 100 {
		if err := disk.MakeDir(c.set.root); err != nil {
			return nil, err
		}
		for _, name := range c.set.dirs("") {
			if err := c.set.makeDir(name); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
		err := c.set.makeDir(c.rel())
		if errors.Is(err, fs.ErrNotExist) {
			continue // an empty parent directory was removed in between
		}
		if err == nil || errors.Is(err, fs.ErrExist) {
			if serr := c.set.secure(c.ID); serr != nil {
				return nil, serr
			}
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		lock, lerr := c.proc("").lockEnding(true)
		if errors.Is(lerr, fs.ErrNotExist) {
			continue
		}
		if errdefs.IsUnavailable(lerr) {
			return nil, busy("it is in use: take another ID, or let its run end")
		}
		if lerr != nil {
			return nil, lerr
		}
		if err == nil {
			return lock, nil
		}
		// The directory exists. If it has no record, a killed process has left it.
		old, rerr := c.set.read(c.ID)
		if rerr == nil && old.runIsGone() {
			rerr = old.clear(ctx, nil)
			if rerr == nil {
				rerr = old.removeResources(ctx)
			}
		} else if rerr == nil {
			rerr = errclass.Errorf(errdefs.ErrAlreadyExists, "it exists: remove it with task rm, or take another ID")
		} else if errdefs.IsNotFound(rerr) {
			rerr = nil
		}
		if rerr == nil {
			rerr = c.empty()
		}
		if rerr != nil {
			_ = lock.Close()
			return nil, rerr
		}
		return lock, nil
	}
	return nil, busy("its directory is removed again and again")
}

// lockFile takes the exclusive lock on a file. Its last owner may have just removed the file. Processes that only check
// whether an owner lives hold the lock for an instant, so lockFile waits that long; after that the error is
// Unavailable.
func lockFile(t disk.Tree, name string, create bool) (*os.File, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE
	}
	for tries := 0; ; tries++ {
		f, err := t.LockFile(context.Background(), name, flags, 0o600, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case !errors.Is(err, unix.EWOULDBLOCK):
			return f, err
		case tries > 20:
			return nil, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Get returns a container, or NotFound.
func (s *Containers) Get(id string) (*Container, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	return s.read(id)
}

// Any is like Get. If the record can't be read, it returns a container with only the ID, so that it can be removed.
func (s *Containers) Any(id string) (*Container, error) {
	c, err := s.Get(id)
	if errdefs.IsFailedPrecondition(err) {
		return s.unread(id), nil
	}
	return c, err
}

// unread returns a container of which only the ID is known.
func (s *Containers) unread(id string) *Container {
	return &Container{Record: Record{ID: id, Namespace: s.namespace}, dir: filepath.Join(s.dir(), id), set: s, unread: true}
}

func (s *Containers) read(id string) (*Container, error) {
	c, err := s.readRecord(id)
	if err == nil {
		c.own = c.isSealed()
	}
	return c, err
}

// List returns the containers, sorted by ID. With begun, it returns only those with the state of a run on this host,
// which includes every container with a process. Containers whose records can't be read are reported by an error,
// beside the list.
func (s *Containers) List(begun bool) ([]*Container, error) {
	ids, err := s.ids()
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	if begun {
		ids = slices.DeleteFunc(ids, func(id string) bool {
			key, err := Key(s.namespace, id)
			if err == nil {
				_, err = os.Lstat(filepath.Join(claimDir(s.state, key), "state.json"))
			}
			return errors.Is(err, fs.ErrNotExist)
		})
	}
	var all []*Container
	var errs []error
	for _, id := range ids {
		c, err := s.read(id)
		switch {
		case err == nil:
			all = append(all, c)
		case !errdefs.IsNotFound(err):
			errs = append(errs, err)
		}
	}
	return all, errors.Join(errs...)
}

// ids lists the IDs for which there are directories, sorted.
func (s *Containers) ids() ([]string, error) {
	if err := s.check(""); err != nil {
		return nil, err
	}
	d, err := s.tree().OpenDir(filepath.Join("containers", s.namespace))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	names = slices.DeleteFunc(names, func(name string) bool { return CheckID(name) != nil })
	slices.Sort(names)
	return names, err
}

// empty deletes the contents of the directory except the lock, and unmounts what is mounted in it.
func (c *Container) empty() error {
	if err := c.UnmountRoot(); err != nil {
		return err
	}
	if mounted(c.path("rootfs")) {
		return busy("something else is mounted on %s", c.path("rootfs"))
	}
	// The record goes first. After that a sweep need not keep anything for the container.
	if err := c.proc("").empty(); err != nil {
		return err
	}
	return c.removeSecrets()
}

// UnmountRoot unmounts the root filesystem if it is mounted.
func (c *Container) UnmountRoot() error {
	d, err := c.set.openStored(strings.Split(c.rel(), "/"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	fi, err := disk.StatAt(d, "rootfs")
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.IsDir() {
		return nil // nothing can be mounted on a symbolic link
	}
	if err == nil {
		err = c.set.snapshots.Unmount(procPath(d) + "/rootfs")
	}
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// delete deletes the directory, the lock last, and directories above that become empty.
func (c *Container) delete(lock *os.File) error {
	defer lock.Close()
	if err := c.empty(); err != nil {
		return err
	}
	if c.RemoveAtEnd || c.unread {
		c.unmarkDue()
	}
	if err := c.proc("").removeEmptied(lock); err != nil {
		return err
	}
	tree := c.set.tree()
	if tree.RemoveDir(filepath.Dir(c.rel())) == nil {
		c.set.removeDue()
	}
	_ = tree.RemoveDir("containers")
	return nil
}

// mounted reports whether something is mounted on a directory. It returns false if that can't be determined.
func mounted(dir string) bool { return mountedAt(unix.AT_FDCWD, dir) }

// mountedAt is mounted of a path that begins at an open directory, "" for that itself.
func mountedAt(at int, dir string) bool {
	var st unix.Statx_t
	if err := unix.Statx(at, dir, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return false
	}
	return st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
