package snapshot

import (
	"bufio"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// mountsOf lists the mount points of a snapshot. For a view it includes bind mounts of its parent's files.
func (s *Snapshotter) mountsOf(e entry) ([]string, error) {
	t := s.tree(e.id, e.record)
	where, err := mountsOf(t)
	if err != nil || e.Kind != View || len(t.Parents) == 0 {
		return where, err
	}
	files, err := s.filesShown(t)
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

// mountEntry is a line of /proc/self/mountinfo, unescaped.
type mountEntry struct {
	root, point, fstype, source, super string
	options                            []string // per-mount options: ro, nosuid, ...
	covered                            bool     // another mount covers the mount point
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
	lines.Buffer(make([]byte, 64<<10), 1<<20) // an overlay of 500 lower directories makes a long line
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

// topmost returns the topmost mount on a directory.
func (t mountTable) topmost(dir string) (mountEntry, bool) {
	for i := len(t) - 1; i >= 0; i-- {
		if t[i].point == dir {
			return t[i], true
		}
	}
	return mountEntry{}, false
}

// sourcePrefix begins the source of our overlay mounts.
const sourcePrefix = "distkit:"

// MountSource returns the source given to an overlay mount of the snapshot, by which mountinfo can be searched; the
// kernel does not use it. It is distkit:DEV:INO:BTIME/ID, where device, inode and time of birth are those of the
// directory that holds the snapshots. This is short, since fsconfig(2) takes 255 bytes, while a path may be long. The
// time of birth tells the directory from an earlier one with the same inode.
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

// files identifies the files that a mount of a snapshot shows.
type files struct {
	source string // source of an overlay mount
	dir    string // directory of a bind mount
}

func filesOf(t Tree) (files, error) {
	source, err := t.MountSource()
	return files{source: source, dir: t.FS()}, err
}

// filesShown returns the files that a mount of the snapshot shows. A view may show its parent's.
func (s *Snapshotter) filesShown(t Tree) (files, error) {
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

// shows reports whether the mount shows these files.
func (m mountEntry) shows(f files) bool {
	if m.fstype == "overlay" && strings.HasPrefix(m.source, sourcePrefix) {
		return m.source == f.source
	}
	return m.isRoot(f.dir)
}

// ofSnapshot reports whether the mount is one of a snapshot, of any store.
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

// isRoot reports whether the mount is a bind mount of dir. mountinfo gives the mount's root relative to its file
// system. So the ends of the paths are compared, and then the directories themselves. If another mount covers the mount
// point, the directory can't be reached, and the paths alone decide.
func (m mountEntry) isRoot(dir string) bool {
	n := len(filepath.Dir(filepath.Dir(dir)))
	if !strings.HasSuffix(m.root, dir[n:]) {
		return false
	}
	if !m.covered {
		return sameDir(m.point, dir)
	}
	if resolved, err := filepath.EvalSymlinks(dir); err == nil {
		dir = resolved
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

// BrieflyMounted is the prefix of directories, next to a snapshot's fs, on which a driver mounts something briefly if
// the kernel needs a mount point. If the driver is killed, the mount remains. It does not mean that the snapshot is in
// use, and whoever has locked the snapshot may unmount it.
const BrieflyMounted = "mount-"

// mountsOf lists the mount points of the snapshot t, as a whole or as a layer of an overlay, whoever mounted it. It
// includes mounts below the snapshot's directory.
func mountsOf(t Tree) ([]string, error) {
	f, err := filesOf(t)
	if err != nil {
		return nil, err
	}
	table, err := readMounts()
	if err != nil {
		return nil, err
	}
	resolved, err := filepath.EvalSymlinks(t.Dir)
	if err != nil {
		return nil, err
	}
	var where []string
	for _, m := range table {
		if strings.HasPrefix(m.point, resolved+"/"+BrieflyMounted) {
			continue
		}
		if strings.HasPrefix(m.point, resolved+"/") || m.shows(f) ||
			m.fstype == "overlay" && (mentions(m.super, f.dir) || mentions(m.super, filepath.Join(resolved, "fs"))) {
			where = append(where, m.point)
		}
	}
	return where, nil
}

// mentions reports whether the options of an overlay mount, made with absolute paths, have dir as a layer.
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
