package snapshot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mount mounts an active snapshot or a view on the directory target. It does nothing where
// that is mounted there already; Unavailable where another snapshot is.
func (s *Snapshotter) Mount(ctx context.Context, key, target string) error {
	if err := s.mount(key, target); err != nil {
		return fmt.Errorf("mount %s: %w", key, err)
	}
	return nil
}

func (s *Snapshotter) mount(key, target string) error {
	t, err := s.mountable(key)
	if err != nil {
		return err
	}
	if target, err = realDir(target); err != nil {
		return err
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	if m, ok := table.at(target); ok {
		switch dir, ok := m.snapshot(); {
		case ok && (sameDir(dir, t.Dir) || shows(s.driver.Mounts(t), m)):
			return nil
		case ok:
			return errdefs.ErrUnavailable.WithMessage(fmt.Sprintf("another snapshot (%s) is mounted on %s", dir, target))
		}
	}
	return s.driver.Mount(t, target)
}

// shows tells whether m is the one bind mount in want: a view with one parent has that
// parent's directory for its source.
func shows(want []Mount, m mountEntry) bool {
	return len(want) == 1 && want[0].Type == "bind" && m.isRoot(want[0].Source)
}

// Mountpoints are the places where a snapshot is mounted in this process's mount namespace.
func (s *Snapshotter) Mountpoints(_ context.Context, key string) ([]string, error) {
	e, err := s.lookup(key)
	if err == nil {
		var where []string
		if where, err = mountsOf(s.dirOf(e.id)); err == nil {
			return where, nil
		}
	}
	return nil, fmt.Errorf("mounts of %s: %w", key, err)
}

// UnmountAll unmounts an active snapshot or a view wherever it is mounted in this process's
// mount namespace; a committed one is mounted nowhere, but as a part of others. Unavailable
// where it is in use, or where what is mounted may be another view of the same files.
func (s *Snapshotter) UnmountAll(_ context.Context, key string) error {
	err := func() error {
		e, err := s.lookup(key)
		if err != nil || e.Kind == Committed {
			return err
		}
		where, err := s.mountsOf(e)
		if err != nil {
			return err
		}
		for _, target := range slices.Backward(where) { // what is mounted last is above
			if err := unmount(target); err != nil {
				return fmt.Errorf("%s: %w", target, err)
			}
		}
		return nil
	}()
	if err != nil {
		return fmt.Errorf("unmount %s: %w", key, err)
	}
	return nil
}

// mountsOf lists where a snapshot is mounted, views that show their parent's files included.
func (s *Snapshotter) mountsOf(e entry) ([]string, error) {
	where, err := mountsOf(s.dirOf(e.id))
	t := s.tree(e.id, e.record)
	if err != nil || e.Kind != View || len(t.Parents) == 0 {
		return where, err
	}
	m := s.driver.Mounts(t)
	if len(m) != 1 || m[0].Source != t.ParentFS() {
		return where, nil
	}
	table, err := readMounts()
	if err != nil {
		return nil, err
	}
	for _, mount := range table {
		if mount.fstype != "overlay" && mount.isRoot(m[0].Source) {
			where = append(where, mount.point)
		}
	}
	if len(where) == 0 {
		return nil, nil
	}
	all, err := s.entries()
	for _, o := range all {
		if o.Kind == View && o.id != e.id && len(o.Parents) > 0 && o.Parents[0] == e.Parents[0] {
			return nil, errdefs.ErrUnavailable.WithMessage(fmt.Sprintf(
				"it or %s, a view of the same files, is mounted on %s: unmount that first", o.Key, strings.Join(where, ", ")))
		}
	}
	return where, err
}

// Unmount unmounts the snapshot that is mounted on the directory target, and does nothing
// where nothing is. FailedPrecondition where what is mounted there is no snapshot,
// Unavailable where it is in use.
func Unmount(target string) error {
	dir, err := realDir(target)
	if err == nil {
		err = unmount(dir)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

func unmount(dir string) error {
	table, err := readMounts()
	if err != nil {
		return err
	}
	m, ok := table.at(dir)
	if !ok {
		return nil
	}
	if _, ok := m.snapshot(); !ok {
		return errdefs.ErrFailedPrecondition.WithMessage("what is mounted there is no snapshot (" + m.fstype + ")")
	}
	switch err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); {
	case errors.Is(err, unix.EBUSY):
		return errdefs.ErrUnavailable.WithMessage("it is in use")
	case errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage("only root can unmount")
	default:
		return err
	}
}

func realDir(name string) (string, error) {
	dir, err := filepath.Abs(name)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return "", errdefs.ErrNotFound.WithMessage("no such directory: " + name)
	}
	if err != nil {
		return "", err
	}
	if fi, err := os.Stat(dir); err != nil {
		return "", err
	} else if !fi.IsDir() {
		return "", errdefs.ErrInvalidArgument.WithMessage("not a directory: " + name)
	}
	return dir, nil
}

// BindMount shows the directory source at target, read-only if asked. It is of no use to an
// ordinary user outside a user namespace of his own.
func BindMount(source, target string, readOnly bool) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		// Private: what is mounted below the target must not appear in the store.
		attr := unix.MountAttr{Propagation: unix.MS_PRIVATE}
		if readOnly {
			attr.Attr_set = unix.MOUNT_ATTR_RDONLY
		}
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
		if err == nil {
			err = unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
	}
	if errors.Is(err, unix.ENOSYS) {
		err = bindMount(source, target, readOnly)
	}
	return MountError("bind "+source+" to "+target, err)
}

// bindMount is for kernels before 5.12.
func bindMount(source, target string, readOnly bool) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	err := unix.Mount("", target, "", unix.MS_PRIVATE, "")
	if err == nil && readOnly {
		err = unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}
	if err != nil {
		_ = unix.Unmount(target, 0)
	}
	return err
}

// MountError says what a system call that mounts failed at, and gives it its class.
func MountError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage(what + ": only root can mount (CAP_SYS_ADMIN)")
	case errors.Is(err, unix.ENOENT):
		return errdefs.ErrNotFound.WithMessage(what + ": no such file or directory")
	}
	return fmt.Errorf("%s: %w", what, err)
}

// mountEntry is a line of /proc/self/mountinfo, unescaped.
type mountEntry struct {
	root, point, fstype, source, super string
}

type mountTable []mountEntry

func readMounts() (mountTable, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	var t mountTable
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 64<<10), 1<<20) // 500 lower directories are a long line
	for lines.Scan() {
		left, right, ok := strings.Cut(lines.Text(), " - ")
		l, r := strings.Fields(left), strings.Split(right, " ")
		if !ok || len(l) < 6 || len(r) < 3 {
			continue
		}
		t = append(t, mountEntry{
			root: unescape(l[3]), point: unescape(l[4]),
			fstype: r[0], source: unescape(r[1]), super: unescape(r[2]),
		})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return t, nil
}

func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// at is what is mounted last on a directory.
func (t mountTable) at(dir string) (mountEntry, bool) {
	for i := len(t) - 1; i >= 0; i-- {
		if t[i].point == dir {
			return t[i], true
		}
	}
	return mountEntry{}, false
}

// snapshot is the directory of the snapshot that a mount shows: our overlay mounts carry it
// as their source, and a bind mount of it has its files for a root.
func (m mountEntry) snapshot() (string, bool) {
	dir := m.source
	if m.fstype != "overlay" || !filepath.IsAbs(dir) {
		var ok bool
		if dir, ok = strings.CutSuffix(m.root, "/fs"); !ok {
			return "", false
		}
	}
	_, err := strconv.ParseUint(filepath.Base(dir), 10, 64)
	return dir, err == nil && filepath.Base(filepath.Dir(filepath.Dir(dir))) == "snapshots"
}

// isRoot tells whether a mount is a bind mount of dir. The root that mountinfo shows is
// relative to its filesystem, so the end of the path is compared, and then the directory.
func (m mountEntry) isRoot(dir string) bool {
	n := len(filepath.Dir(filepath.Dir(dir)))
	return strings.HasSuffix(m.root, dir[n:]) && sameDir(m.point, dir)
}

func sameDir(a, b string) bool {
	if a == b {
		return true
	}
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// mountsOf lists where the snapshot in dir is mounted, alone or as a layer, by whatever
// means, and what is mounted below dir itself.
func mountsOf(dir string) ([]string, error) {
	table, err := readMounts()
	if err != nil {
		return nil, err
	}
	files := filepath.Join(dir, "fs")
	real := dir
	if r, err := filepath.EvalSymlinks(dir); err == nil {
		real = r
	}
	var where []string
	for _, m := range table {
		used := strings.HasPrefix(m.point, real+"/")
		switch {
		case used:
		case m.fstype == "overlay":
			used = m.source == dir || m.source == real || filepath.Base(m.source) == filepath.Base(dir) && sameDir(m.source, dir)
			for _, name := range []string{files, filepath.Join(real, "fs")} {
				used = used || mentions(m.super, name)
			}
		default:
			used = m.isRoot(files)
		}
		if used {
			where = append(where, m.point)
		}
	}
	return where, nil
}

// mentions tells whether an overlay mount made from the absolute paths has dir as a layer.
func mentions(options, dir string) bool {
	for {
		i := strings.Index(options, dir)
		if i < 0 {
			return false
		}
		options = options[i+len(dir):]
		if options == "" || options[0] == ',' || options[0] == ':' {
			return true
		}
	}
}
