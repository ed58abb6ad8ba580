package archive

import (
	"errors"
	"fmt"
	"hash/maphash"
	"path"
	"slices"
	"strings"

	"distkit/disk/sys"

	"golang.org/x/sys/unix"
)

const (
	maxOpen  = 128  // directories held open
	maxLinks = 4096 // paths through symbolic links remembered
	maxHops  = 40   // symbolic links followed for one path, as the kernel does
	maxPath  = 4095 // bytes of a name, PATH_MAX without its NUL
)

// A tree holds directories open by their canonical path, and remembers which canonical path a
// path through symbolic links stands for.
//
// The invariant that keeps entries from each other's way: a path in open consists of real
// directories, and one in links leads where it led when it was looked up. What removes a
// directory drops it and all below it, and all links; what removes a symbolic link drops all
// links.
type tree struct {
	root       *dir
	open       map[string]*dir
	links      map[string]string
	mustExist  bool   // lookups create nothing
	privileged bool   // permission bits don't bind us
	opaque     string // the attribute of an opaque directory in overlay form, else ""

	// Paths that this layer created where it did not create the parent, and directories of
	// lower layers that it names or adds to, by hash: 64 bits with a secret seed can't be made
	// to collide.
	seed             maphash.Seed
	created, touched map[uint64]struct{}
	opaques          map[uint64]struct{} // directories, in overlay form

	report *report // of what lower layers would tell, or nil
}

const (
	unchanged = ^uint32(0)

	defaultACL = "system.posix_acl_default"
	accessACL  = "system.posix_acl_access"
)

func newTree(root string) (*tree, error) {
	fd, err := sys.Open(root, sys.OpenDir&^unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	t := &tree{
		root:       &dir{fd: fd},
		open:       map[string]*dir{},
		links:      map[string]string{},
		privileged: unix.Geteuid() == 0,
		seed:       maphash.MakeSeed(),
		created:    map[uint64]struct{}{},
		touched:    map[uint64]struct{}{},
		opaques:    map[uint64]struct{}{},
	}
	names, err := sys.Names(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	t.root.ours = len(names) == 0
	if !t.root.ours {
		var st unix.Stat_t
		if err := sys.Fstat(fd, &st); err == nil {
			t.root.times = &[2]unix.Timespec{st.Atim, st.Mtim}
		}
	}
	return t, nil
}

func (t *tree) hash(p string) uint64 { return maphash.String(t.seed, p) }

func has(set map[uint64]struct{}, h uint64) bool { _, ok := set[h]; return ok }

func join(dir, base string) string {
	if dir == "" {
		return base
	}
	return dir + "/" + base
}

func split(p string) (dir, base string) {
	i := strings.LastIndexByte(p, '/')
	if i < 0 {
		return "", p
	}
	return p[:i], p[i+1:]
}

// wrote records that this layer made base in d.
func (t *tree) wrote(d *dir, base string) {
	if t.report != nil && len(t.report.links) > 0 {
		delete(t.report.links, t.hash(join(d.path, base)))
	}
	if !d.ours {
		t.created[t.hash(join(d.path, base))] = struct{}{}
		t.touch(d)
	}
}

// touch records that a directory of lower layers, and so its parents, are in this layer too.
func (t *tree) touch(d *dir) {
	if d.ours || d.touched {
		return
	}
	d.touched = true
	for p := d.path; p != ""; p, _ = split(p) {
		h := t.hash(p)
		if has(t.touched, h) {
			return
		}
		t.touched[h] = struct{}{}
	}
}

// isOurs tells whether this layer created the path or a directory above it.
func (t *tree) isOurs(p string) bool {
	if t.root.ours {
		return true
	}
	for ; p != ""; p, _ = split(p) {
		if has(t.created, t.hash(p)) {
			return true
		}
	}
	return false
}

// lookup returns the directory that a cleaned, relative path leads to inside the target, and
// creates what is missing on the way. The directory stays open until the next call that is
// not told to keep it.
func (t *tree) lookup(p string, keep ...*dir) (*dir, error) {
	if d, ok := t.open[p]; ok {
		return d, nil
	}
	if p == "" {
		return t.root, nil
	}
	if c, ok := t.links[p]; ok {
		return t.lookup(c, keep...)
	}
	if err := t.makeRoom(keep...); err != nil {
		return nil, err
	}
	from := t.root
	rest := p
	for a, _ := split(p); a != ""; a, _ = split(a) {
		if d, ok := t.open[a]; ok {
			from, rest = d, p[len(a)+1:]
			break
		}
	}
	fd, err := openBeneath(from.fd, rest)
	if err == nil {
		return t.add(p, fd)
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EACCES):
		return t.walk(p, keep...)
	}
	return nil, err
}

// existing is lookup for a directory that must be there.
func (t *tree) existing(p string) (*dir, error) {
	t.mustExist = true
	defer func() { t.mustExist = false }()
	return t.lookup(p)
}

// add makes an open directory known that was not created just now.
func (t *tree) add(p string, fd int) (*dir, error) {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	d := &dir{fd: fd, path: p, ours: t.isOurs(p), times: &[2]unix.Timespec{st.Atim, st.Mtim}}
	if !t.privileged && st.Mode&0o700 != 0o700 && sys.Fchmod(fd, st.Mode&0o7777|0o700) == nil {
		d.mode, d.setMode = st.Mode&0o7777, true
	}
	t.open[p] = d
	return d, nil
}

// walk resolves a path one component at a time, with symbolic links followed as if the target
// were the root of the file system. It holds no path that it did not open itself.
func (t *tree) walk(p string, keep ...*dir) (*dir, error) {
	d, todo, hops := t.root, strings.Split(p, "/"), 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			up, _ := split(d.path)
			var err error
			if d, err = t.lookup(up, keep...); err != nil {
				return nil, err
			}
			continue
		}
		child, target, err := t.child(d, name, keep...)
		if t.mustExist && errors.Is(err, unix.ENOENT) {
			return nil, &missing{d, strings.Join(append([]string{name}, todo...), "/")}
		}
		if err != nil {
			return nil, err
		}
		if child != nil {
			d = child
			continue
		}
		if hops++; hops > maxHops {
			return nil, unix.ELOOP
		}
		if strings.HasPrefix(target, "/") {
			d = t.root
		}
		todo = append(strings.Split(target, "/"), todo...)
		if len(todo) > maxPath {
			return nil, unix.ENAMETOOLONG
		}
	}
	if d.path != p {
		if len(t.links) >= maxLinks {
			clear(t.links)
		}
		t.links[p] = d.path
	}
	return d, nil
}

// child opens, or creates, the directory name in d; or returns where it leads, if it is a
// symbolic link.
func (t *tree) child(d *dir, name string, keep ...*dir) (*dir, string, error) {
	p := join(d.path, name)
	if c, ok := t.open[p]; ok {
		return c, "", nil
	}
	fd, err := openBeneath(d.fd, name)
	if errors.Is(err, unix.EACCES) && !t.privileged {
		fd, err = openForbidden(d.fd, name)
	}
	switch {
	case err == nil:
		if err := t.makeRoom(append(keep, d)...); err != nil {
			_ = unix.Close(fd)
			return nil, "", err
		}
		c, err := t.add(p, fd)
		return c, "", err
	case errors.Is(err, unix.ENOENT) && !t.mustExist:
		c, _, err := t.mkdir(d, name, 0o755, keep...)
		if err == nil {
			t.implied(p)
		}
		return c, "", err
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		buf := make([]byte, maxPath+1)
		n, err := sys.Readlinkat(d.fd, name, buf)
		if err == nil {
			return nil, string(buf[:n]), nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return nil, "", err
		}
		var st unix.Stat_t
		if err := sys.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, "", err
		}
		if t.opaque != "" && isWhiteout(&st) && !t.mustExist {
			c, _, err := t.mkdir(d, name, 0o755, keep...)
			return c, "", err
		}
		return nil, "", refused("%s is not a directory", quote(p))
	}
	return nil, "", err
}

// remove removes what is at name in d, with everything below it.
func (t *tree) remove(d *dir, name string) error {
	var st unix.Stat_t
	if err := sys.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ignore(err, unix.ENOENT)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		t.again(join(d.path, name), "a directory is replaced by what is none")
		t.drop(join(d.path, name))
		return sys.RemoveAll(d.fd, name)
	case unix.S_IFLNK:
		clear(t.links)
	}
	return sys.Unlinkat(d.fd, name, 0)
}

// drop forgets a directory that is about to go, all below it, and every link.
func (t *tree) drop(p string) {
	clear(t.links)
	for q, d := range t.open {
		if q == p || len(q) > len(p) && q[len(p)] == '/' && q[:len(p)] == p {
			_ = unix.Close(d.fd)
			delete(t.open, q)
		}
	}
}

// makeRoom lets one more directory be opened.
func (t *tree) makeRoom(keep ...*dir) error {
	if len(t.open) < maxOpen {
		return nil
	}
	return t.closeAll(keep...)
}

// closeAll closes every directory but the target and those to keep, and gives each its times
// and mode.
func (t *tree) closeAll(keep ...*dir) error {
	var first error
	for p, d := range t.open {
		if slices.Contains(keep, d) {
			continue
		}
		if err := d.close(); err != nil && first == nil {
			first = fmt.Errorf("%s: %w", quote(p), err)
		}
		delete(t.open, p)
	}
	return first
}

// finish is closeAll with the target itself.
func (t *tree) finish() error {
	return errors.Join(t.closeAll(), t.root.close())
}

// abandon closes everything as it is.
func (t *tree) abandon() {
	for _, d := range t.open {
		_ = unix.Close(d.fd)
	}
	clear(t.open)
	_ = unix.Close(t.root.fd)
}

// openBeneath opens the directory at a relative path below fd that has no symbolic link in it.
func openBeneath(fd int, p string) (int, error) { return sys.OpenBeneath(fd, p, sys.OpenDir, 0) }

func ignore(err error, ignored ...error) error {
	for _, i := range ignored {
		if errors.Is(err, i) {
			return nil
		}
	}
	return err
}

// clean makes a name of an archive relative to the target: "" is the target itself. What
// leads above it stops there, as at the root of a file system.
func clean(name string) string {
	return path.Clean("/" + name)[1:]
}
