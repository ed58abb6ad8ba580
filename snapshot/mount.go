package snapshot

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// MountOptions say what a mount keeps from those who use it.
type MountOptions struct {
	NoSuid bool // set-user-ID bits and file capabilities of its files have no effect
	NoDev  bool // its device files can't be opened
	NoExec bool // its programs can't be executed

	// Users is a user namespace, nil for none. In the mount the files' owners, which stay as they are on disk, are those that the
	// IDs have in it: what belongs to 0 belongs to whoever is root there.
	Users *os.File
}

// DefaultMountOptions are those of [Snapshotter.Mount]. A view is for looking at, by whoever reaches the
// directory: none of its programs may give them its owners' rights.
func DefaultMountOptions(k Kind) MountOptions {
	return MountOptions{NoSuid: k == View, NoDev: k == View}
}

// words are the options' names in mount(8) and /proc/self/mountinfo.
func (o MountOptions) words() (words []string) {
	if o.NoSuid {
		words = append(words, "nosuid")
	}
	if o.NoDev {
		words = append(words, "nodev")
	}
	if o.NoExec {
		words = append(words, "noexec")
	}
	return words
}

// Attributes are the options as mount_setattr(2) and fsmount(2) take them.
func (o MountOptions) Attributes() (attributes int) {
	if o.NoSuid {
		attributes |= unix.MOUNT_ATTR_NOSUID
	}
	if o.NoDev {
		attributes |= unix.MOUNT_ATTR_NODEV
	}
	if o.NoExec {
		attributes |= unix.MOUNT_ATTR_NOEXEC
	}
	return attributes
}

// Flags are the options as mount(2) takes them.
func (o MountOptions) Flags() (flags uintptr) {
	if o.NoSuid {
		flags |= unix.MS_NOSUID
	}
	if o.NoDev {
		flags |= unix.MS_NODEV
	}
	if o.NoExec {
		flags |= unix.MS_NOEXEC
	}
	return flags
}

// Mount is [Snapshotter.MountWith] the default options.
func (s *Snapshotter) Mount(ctx context.Context, key, target string) error {
	return s.mountAs(key, target, DefaultMountOptions)
}

// MountWith mounts an active snapshot or a view on the directory target. It does nothing where
// that is mounted there already with the options. Unavailable where it is mounted there without
// them, where another snapshot is, and while another process commits or removes the snapshot.
func (s *Snapshotter) MountWith(ctx context.Context, key, target string, o MountOptions) error {
	return s.mountAs(key, target, func(Kind) MountOptions { return o })
}

func (s *Snapshotter) mountAs(key, target string, options func(Kind) MountOptions) error {
	if err := retry(func() error { return s.mount(key, target, options) }); err != nil {
		return fmt.Errorf("mount %s: %w", key, err)
	}
	return nil
}

func (s *Snapshotter) mount(key, target string, options func(Kind) MountOptions) error {
	e, err := s.lookupIntact(key)
	if err != nil {
		return err
	}
	// The lock keeps Commit and Remove away until the mount can be seen. The record counts as it is
	// under the lock.
	held, err := s.use(e, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer disk.Release(held)
	if e, err = s.read(e.id); err != nil || e.Key != key {
		return cmp.Or(err, errChanged)
	}
	if e.Kind == Committed {
		return errCommitted
	}
	t := s.tree(e.id, e.record)
	o := options(e.Kind)
	if target, err = realDir(target); err != nil {
		return err
	}
	table, err := readMounts()
	if err != nil {
		return err
	}
	if m, ok := table.at(target); ok {
		files, err := s.shown(t)
		if err != nil {
			return err
		}
		switch {
		case m.shows(files) && o.Users != nil:
			return errdefs.ErrUnavailable.WithMessage("it is mounted on " + target + ", and may have other owners there: unmount it first")
		case m.shows(files):
			for _, w := range o.words() {
				if !slices.Contains(m.options, w) {
					return errdefs.ErrUnavailable.WithMessage("it is mounted on " + target + " without " + w + ": unmount it first")
				}
			}
			return nil
		case m.ofSnapshot():
			return errdefs.ErrUnavailable.WithMessage("another snapshot is mounted on " + target)
		}
	}
	step("mounting")
	return s.driver.Mount(t, target, o)
}

// use locks a snapshot's directory without waiting: shared by those who mount it or prepare from it,
// exclusively by those who commit or remove it. errChanged where the snapshot is gone.
func (s *Snapshotter) use(e entry, how int) (*os.File, error) {
	f, err := lockFile(context.Background(), s.dirOf(e.id), unix.O_DIRECTORY, how|unix.LOCK_NB)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errChanged
	case errors.Is(err, unix.EWOULDBLOCK) && how == unix.LOCK_SH:
		return nil, fmt.Errorf("it is being committed or removed: %w", err)
	case errors.Is(err, unix.EWOULDBLOCK):
		return nil, fmt.Errorf("it is being mounted, prepared from, committed or removed: %w", err)
	}
	return f, err
}

// unmounted fails where a snapshot, whose directory the caller has locked, is mounted.
func (s *Snapshotter) unmounted(e entry) error {
	where, err := mountsOf(s.tree(e.id, e.record))
	if err == nil && len(where) > 0 {
		err = errdefs.ErrUnavailable.WithMessage("it is mounted on " + strings.Join(where, ", "))
	}
	return err
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
	t := s.tree(e.id, e.record)
	where, err := mountsOf(t)
	if err != nil || e.Kind != View || len(t.Parents) == 0 {
		return where, err
	}
	files, err := s.shown(t)
	if err != nil || files.dir != t.ParentFS() {
		return where, err
	}
	table, err := readMounts()
	if err != nil {
		return nil, err
	}
	for _, m := range table {
		if m.fstype != "overlay" && m.shows(files) {
			where = append(where, m.point)
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
	if !m.ofSnapshot() {
		return errdefs.ErrFailedPrecondition.WithMessage("what is mounted there is no snapshot (" + m.fstype + ")")
	}
	switch err := sys.Unmount(dir, unix.UMOUNT_NOFOLLOW); {
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

// OpenFiles opens the directory ID/fs of a store's snapshots, neither of which may be a symbolic link.
func OpenFiles(dir string) (*os.File, error) {
	snapshot, name := filepath.Split(dir)
	store, id := filepath.Split(filepath.Clean(snapshot))
	return disk.Tree(store).OpenDir(filepath.Join(id, name))
}

// BindMount shows the directory source at target, read-only if asked. It is of no use to an
// ordinary user outside a user namespace of his own.
func BindMount(source, target string, readOnly bool, o MountOptions) error {
	// A link in a store leads nowhere.
	dir, err := OpenFiles(source)
	if err != nil {
		return err
	}
	defer dir.Close()
	fd, err := sys.OpenTree(int(dir.Fd()), "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		// Private: what is mounted below the target must not appear in the store.
		attr := unix.MountAttr{Propagation: unix.MS_PRIVATE, Attr_set: uint64(o.Attributes())}
		if readOnly {
			attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
		}
		if o.Users != nil {
			attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
			attr.Userns_fd = uint64(o.Users.Fd())
		}
		err = sys.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
		if err == nil {
			err = sys.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
		}
	}
	if o.Users != nil && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL)) {
		return NotMapped(source)
	}
	if errors.Is(err, unix.ENOSYS) {
		flags := o.Flags()
		if readOnly {
			flags |= unix.MS_RDONLY
		}
		err = bindMount(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), target, flags)
	}
	return MountError("bind "+source+" to "+target, err)
}

// NotMapped is the error of [MountOptions] with Users where the kernel, or the file system of a directory, has no such mounts.
func NotMapped(dir string) error {
	return errdefs.ErrNotImplemented.WithMessage("owners can't be mapped in a mount of " + dir + ": its file system or the kernel has no ID-mapped mounts")
}

// bindMount is for kernels before 5.12.
func bindMount(source, target string, flags uintptr) error {
	if err := sys.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	err := sys.Mount("", target, "", unix.MS_PRIVATE, "")
	if err == nil && flags != 0 {
		err = sys.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
	}
	if err != nil {
		_ = sys.Unmount(target, 0)
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

// ContextError is MountError for a system call on the file system context fd. It adds what the kernel says about the failure.
func ContextError(fd int, what string, err error) error {
	b := make([]byte, 1024)
	for {
		n, rerr := unix.Read(fd, b)
		if rerr != nil || n == 0 {
			break
		}
		if msg, ok := bytes.CutPrefix(bytes.TrimSpace(b[:n]), []byte("e ")); ok {
			if _, rest, ok := bytes.Cut(msg, []byte(": ")); ok { // the file system's name
				msg = rest
			}
			what += ": " + string(msg)
		}
	}
	return MountError(what, err)
}

// mountEntry is a line of /proc/self/mountinfo, unescaped.
type mountEntry struct {
	root, point, fstype, source, super string
	options                            []string // of the mount: ro, nosuid …
	covered                            bool     // another mount hides it from those who look at the point
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
			root: unescape(l[3]), point: unescape(l[4]), options: strings.Split(l[5], ","),
			fstype: r[0], source: unescape(r[1]), super: unescape(r[2]),
		})
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	last := map[string]int{}
	for i, m := range t {
		last[m.point] = i
	}
	for i := range t {
		for dir := t[i].point; ; dir = path.Dir(dir) {
			if n, ok := last[dir]; ok && n > i {
				t[i].covered = true
			}
			if dir == path.Dir(dir) {
				break
			}
		}
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

// sourcePrefix begins the source of our overlay mounts.
const sourcePrefix = "distkit:"

// MountSource is the source that an overlay mount of the snapshot has in /proc/self/mountinfo, where the kernel shows it
// and otherwise ignores it: distkit:DEV:INO:BTIME/ID, of the directory that holds the snapshots. It is short whatever that
// directory's path is, since fsconfig(2) takes 255 bytes. The time of the directory's birth tells it from an earlier one
// that had its inode.
func (t Tree) MountSource() (string, error) {
	dir, id := filepath.Split(t.Dir)
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_INO|unix.STATX_BTIME, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	var born int64
	if st.Mask&unix.STATX_BTIME != 0 {
		born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return fmt.Sprintf("%s%x:%x:%x/%s", sourcePrefix, unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino, born, id), nil
}

// files are what a mount of a snapshot shows.
type files struct {
	source string // an overlay's
	dir    string // a bind mount's
}

func filesOf(t Tree) (files, error) {
	source, err := t.MountSource()
	return files{source: source, dir: t.FS()}, err
}

// shown are the files that mounting a snapshot shows, which a view may have from its parent.
func (s *Snapshotter) shown(t Tree) (files, error) {
	f, err := filesOf(t)
	if err != nil {
		return f, err
	}
	m, err := s.driver.Mounts(t)
	if err == nil && len(m) == 1 && m[0].Type == "bind" {
		f.dir = m[0].Source
	}
	return f, err
}

// shows reports whether a mount shows these files.
func (m mountEntry) shows(f files) bool {
	if m.fstype == "overlay" && strings.HasPrefix(m.source, sourcePrefix) {
		return m.source == f.source
	}
	return m.isRoot(f.dir)
}

// ofSnapshot reports whether a mount shows a snapshot of whatever store.
func (m mountEntry) ofSnapshot() bool {
	number := func(s string) bool {
		_, err := strconv.ParseUint(s, 10, 64)
		return err == nil
	}
	if source, ok := strings.CutPrefix(m.source, sourcePrefix); ok && m.fstype == "overlay" {
		return number(path.Base(source))
	}
	dir, ok := strings.CutSuffix(m.root, "/fs")
	return ok && number(path.Base(dir)) && path.Base(path.Dir(path.Dir(dir))) == "snapshots"
}

// isRoot reports whether a mount is a bind mount of dir. The root that mountinfo shows is
// relative to its filesystem, so the end of the path is compared, and then the directory. Where that can't
// be reached at the mount point, since another mount covers it, the whole path decides.
func (m mountEntry) isRoot(dir string) bool {
	n := len(filepath.Dir(filepath.Dir(dir)))
	if !strings.HasSuffix(m.root, dir[n:]) {
		return false
	}
	if !m.covered {
		return sameDir(m.point, dir)
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	return strings.HasSuffix(dir, m.root) || strings.HasSuffix(m.root, dir)
}

func sameDir(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// BrieflyMounted begins the names of the directories, in a snapshot's, on which drivers mount something while they use the snapshot,
// where the kernel can't do without. The mount outlives a driver that is killed, and does not say that the snapshot is in use: who has
// the snapshot locked may end it.
const BrieflyMounted = "mount-"

// removeFiles deletes the directory of a snapshot that was detached.
func (s *Snapshotter) removeFiles(ctx context.Context, dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, n := range names {
		if strings.HasPrefix(n.Name(), BrieflyMounted) {
			_ = sys.Unmount(filepath.Join(dir, n.Name()), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // EINVAL: nothing is
		}
	}
	return s.driver.Remove(ctx, dir)
}

// mountsOf lists where the snapshot t is mounted, alone or as a layer, by whatever
// means, and what is mounted below its directory.
func mountsOf(t Tree) ([]string, error) {
	f, err := filesOf(t)
	if err != nil {
		return nil, err
	}
	table, err := readMounts()
	if err != nil {
		return nil, err
	}
	real, err := filepath.EvalSymlinks(t.Dir)
	if err != nil {
		return nil, err
	}
	var where []string
	for _, m := range table {
		if strings.HasPrefix(m.point, real+"/"+BrieflyMounted) {
			continue
		}
		if strings.HasPrefix(m.point, real+"/") || m.shows(f) ||
			m.fstype == "overlay" && (mentions(m.super, f.dir) || mentions(m.super, filepath.Join(real, "fs"))) {
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
