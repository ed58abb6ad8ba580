package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// identity identifies a directory on this host. It differs from that of a copy, and of a later directory with the same
// name.
type identity struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Born   int64  `json:"born,omitempty"` // in nanoseconds since 1970; 0 if the file system does not record it
}

// identify returns a directory's identity.
func identify(dir string) (identity, error) { return identifyAt(unix.AT_FDCWD, dir) }

// identifyAt is identify of a path that begins at an open directory, "" for that itself.
func identifyAt(at int, dir string) (identity, error) {
	var st unix.Statx_t
	err := unix.Statx(at, dir, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_INO|unix.STATX_BTIME|unix.STATX_TYPE, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		return identity{}, &fs.PathError{Op: "statx", Path: dir, Err: err}
	}
	id := identity{Device: unix.Mkdev(st.Dev_major, st.Dev_minor), Inode: st.Ino}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.Born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return id, nil
}

// dirs lists the store's directory of containers, that of the namespace, and, unless id is "", the container's.
func (s *Containers) dirs(id string) []string {
	dirs := []string{"containers", filepath.Join("containers", s.namespace)}
	if id != "" {
		dirs = append(dirs, filepath.Join("containers", s.namespace, id))
	}
	return dirs
}

// check returns FailedPrecondition if anybody except this user and root could have put something into the directories
// of containers. Missing directories are ignored.
func (s *Containers) check(id string) error { return s.checkDirs(s.dirs(id)) }

func (s *Containers) checkDirs(names []string) error {
	for _, name := range names {
		fi, err := s.tree().Stat(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			err = checkDir(s.tree().Path(name), fi)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// checkDir is checkDirs for one existing directory.
func checkDir(path string, fi fs.FileInfo) error {
	st, ok := fi.Sys().(*unix.Stat_t)
	switch {
	case !fi.IsDir():
		return failed("%s is not a directory", path)
	case ok && st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return failed("%s belongs to user %d: only that user works on what is in it", path, st.Uid)
	case ok && st.Mode&0o022 != 0:
		return failed("%s can be written to by other users: nothing in it can be trusted (chmod go-w)", path)
	}
	return nil
}

// makeDir makes a directory in the store that only this user can access, whatever the umask is. fs.ErrExist: it exists.
func (s *Containers) makeDir(name string) error {
	if err := s.tree().Mkdir(name, 0o700); err != nil {
		return err
	}
	return s.tighten(name)
}

// tighten removes other users' access to a directory. It contains environments, set-user-ID programs and devices.
func (s *Containers) tighten(name string) error {
	fi, err := s.tree().Stat(name)
	if err != nil || fi.Mode().Perm() == 0o700 {
		return err
	}
	d, err := s.tree().OpenDir(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Chmod(0o700); err != nil && !errors.Is(err, unix.EPERM) { // EPERM: it is root's, and this user only reads it
		return err
	}
	return nil
}

// secure removes other users' access to the directories of containers and, unless id is "", to the container's. Missing
// directories are ignored.
func (s *Containers) secure(id string) error {
	if err := s.check(id); err != nil {
		return err
	}
	for _, name := range s.dirs(id) {
		if err := s.tighten(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *Containers) tree() disk.Tree { return disk.Tree(s.root) }

// rel returns the name of one of the container's files in the store's tree.
func (c *Container) rel(names ...string) string {
	return filepath.Join(append([]string{"containers", c.set.namespace, c.ID}, names...)...)
}

// privateState returns an error unless only this user can access the state directory. NotFound: there is none.
func privateState(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("state directory: %w", &fs.PathError{Op: "lstat", Path: dir, Err: err})
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return failed("state directory %s is not this user's own", dir)
	}
	return nil
}
