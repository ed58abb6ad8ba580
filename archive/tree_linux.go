package archive

import (
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"math/bits"
	"math/rand/v2"
	"slices"
	"strings"

	"distkit/disk/sys"
	"distkit/layer"

	"golang.org/x/sys/unix"
)

const (
	maxOpen  = 128  // directories open at a time
	maxLinks = 4096 // entries of tree.links
	maxHops  = 40   // symbolic links followed in one path, as in the kernel

	// Symbolic links let a short name lead through many directories. These bound the total of all entries: a constant,
	// and some more for each entry.
	linkedDirs, linkedDirsPerEntry = 1 << 16, 64
)

// A tree caches open directories by their canonical path, and the canonical paths of paths with symbolic links.
//
// Its invariant: each path in open consists of real directories, and each path in links leads where it led when it was
// looked up. So whatever removes a directory drops it, everything below it and all links; whatever removes a symbolic
// link drops all links.
type tree struct {
	root       *dir
	open       map[uint64]*dir   // by the hash of their paths
	links      map[string]string // from a path with symbolic links to the canonical one
	linked     int               // how many directories symbolic links may still lead through
	made       int64             // number of directories created without an entry
	maxDepth   int               // of directories; 0 means no bound
	mustExist  bool              // lookup creates nothing
	privileged bool              // CAP_DAC_OVERRIDE: permission bits don't bind this process
	chowns     bool              // CAP_CHOWN: this process can give files away
	opaque     string            // the attribute of opaque directories in overlay form; "" with Remove

	// Sets of paths by hash. created: those that this layer created in a directory of a lower layer, or below which it
	// hid all of the lower layers. touched: directories of lower layers that this layer has an entry for or adds to.
	hasher
	created, touched map[uint64]struct{}
	opaques          map[uint64]struct{} // opaque directories, in overlay form

	report *report // of what depends on lower layers; nil unless it was asked for
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
		open:       map[uint64]*dir{},
		linked:     linkedDirs,
		links:      map[string]string{},
		privileged: sys.Capable(unix.CAP_DAC_OVERRIDE),
		chowns:     sys.Capable(unix.CAP_CHOWN),
		hasher:     newHasher(),
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

// A hasher hashes paths to 64 bits with secrets, so that nobody can make them collide. A path's hash is computed from
// its parent's, so the hashes of all its parents take no more time than its own.
type hasher struct {
	seed   maphash.Seed
	secret uint64
}

func newHasher() hasher { return hasher{maphash.MakeSeed(), rand.Uint64() | 1} }

// under returns the hash of a name in the directory with hash h.
func (s hasher) under(h uint64, name string) uint64 {
	hi, lo := bits.Mul64(h^maphash.String(s.seed, name), s.secret)
	return hi ^ lo
}

// prefixes yields each directory above a path, from the top down, and then the path itself: the length of its path, and
// its hash.
func (s hasher) prefixes(p string) iter.Seq2[int, uint64] {
	return func(yield func(int, uint64) bool) {
		h := uint64(0)
		for from := 0; from < len(p); {
			end := len(p)
			if i := strings.IndexByte(p[from:], '/'); i >= 0 {
				end = from + i
			}
			h = s.under(h, p[from:end])
			if !yield(end, h) {
				return
			}
			from = end + 1
		}
	}
}

// hash returns the hash of a path. That of the target is 0.
func (s hasher) hash(p string) (h uint64) {
	for _, h = range s.prefixes(p) {
	}
	return h
}

func has(set map[uint64]struct{}, h uint64) bool { _, ok := set[h]; return ok }

func join(dir, base string) string {
	if dir == "" {
		return base
	}
	return dir + "/" + base
}

// wrote records that this layer created base in d.
func (t *tree) wrote(d *dir, base string) {
	if t.report != nil && len(t.report.links) > 0 {
		delete(t.report.links, t.under(d.hash, base))
	}
	if !d.ours {
		t.created[t.under(d.hash, base)] = struct{}{}
		t.touch(d)
	}
}

// touch records that this layer adds to a directory of a lower layer, and so to its parents.
func (t *tree) touch(d *dir) {
	if d.ours || d.touched {
		return
	}
	d.touched = true
	for _, h := range t.prefixes(d.path) {
		t.touched[h] = struct{}{}
	}
}

// isOurs reports whether this layer created the path or a directory above it.
func (t *tree) isOurs(p string) bool {
	if t.root.ours {
		return true
	}
	return t.anyAbove(t.created, p)
}

// anyAbove reports whether a set has a path or a directory above it.
func (t *tree) anyAbove(set map[uint64]struct{}, p string) bool {
	if len(set) == 0 {
		return false
	}
	for _, h := range t.prefixes(p) {
		if has(set, h) {
			return true
		}
	}
	return false
}

// check returns an error if the path of a name in d is too long or too deep.
func (t *tree) check(d *dir, name string) error {
	if n := len(d.path) + 1 + len(name); n > layer.MaxPath {
		return invalid("it leads to a path of %d bytes", n)
	}
	if t.maxDepth > 0 && strings.Count(join(d.path, name), "/") >= t.maxDepth {
		return overLimit("it is deeper than %d names", t.maxDepth)
	}
	return nil
}

// allow raises the limits that grow with each entry and with the number of bytes read.
func (t *tree) allow(read int64) {
	t.linked += linkedDirsPerEntry
	if t.report != nil {
		t.report.limit = maxReport + read
	}
}

// lookup returns the directory that a clean relative path leads to inside the target. It creates missing directories.
// The result stays open until the next call that doesn't list it in keep.
func (t *tree) lookup(p string, keep ...*dir) (*dir, error) {
	from, rest := t.root, p
	for end, h := range t.prefixes(p) {
		if d, ok := t.open[h]; ok {
			from, rest = d, strings.TrimPrefix(p[end:], "/")
		}
	}
	if rest == "" {
		return from, nil
	}
	if c, ok := t.links[p]; ok {
		return t.lookup(c, keep...)
	}
	if err := t.makeRoom(keep...); err != nil {
		return nil, err
	}
	if !t.isOpen(from) { // makeRoom closed it
		from, rest = t.root, p
	}
	fd, err := openBeneath(from.fd, rest)
	if err == nil {
		return t.add(p, fd)
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EACCES):
		from, rest, err := t.deepest(from, rest)
		if err != nil {
			return nil, err
		}
		return t.walk(p, from, rest, keep...)
	}
	return nil, err
}

// deepest opens the longest openable part of a path, with a binary search. The whole path is known to be unopenable. It
// returns that directory and the rest of the path.
func (t *tree) deepest(from *dir, p string) (*dir, string, error) {
	fd, opened := -1, 0 // length of the opened part
	for failed := p; ; {
		middle := opened + (len(failed)-opened)/2
		end := strings.LastIndexByte(failed[:middle], '/')
		if end <= opened {
			if end = strings.IndexByte(failed[middle:], '/') + middle; end < middle {
				break // a single component is left, which failed
			}
		}
		n, err := openBeneath(from.fd, p[:end])
		if err != nil {
			failed = p[:end]
			continue
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		fd, opened = n, end
	}
	if fd < 0 {
		return from, p, nil
	}
	d, err := t.add(join(from.path, p[:opened]), fd)
	return d, p[opened+1:], err
}

// existing is lookup for a directory that must exist.
func (t *tree) existing(p string) (*dir, error) {
	t.mustExist = true
	defer func() { t.mustExist = false }()
	return t.lookup(p)
}

// add records an open directory that existed before.
func (t *tree) add(p string, fd int) (*dir, error) {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	d := &dir{fd: fd, path: p, hash: t.hash(p), ours: t.isOurs(p), times: &[2]unix.Timespec{st.Atim, st.Mtim}}
	if !t.privileged && st.Mode&0o700 != 0o700 && sys.Fchmod(fd, st.Mode&0o7777|0o700) == nil {
		d.mode, d.setMode = st.Mode&0o7777, true
	}
	t.open[d.hash] = d
	return d, nil
}

// walk resolves the rest (todo) of the path p below the directory d, one component at a time. It follows symbolic links
// as if the target were the root of the file system.
func (t *tree) walk(p string, d *dir, todo string, keep ...*dir) (*dir, error) {
	hops := 0
	for todo != "" {
		var name string
		name, todo, _ = strings.Cut(todo, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			up, _ := layer.Split(d.path)
			var err error
			if d, err = t.lookup(up, keep...); err != nil {
				return nil, err
			}
			continue
		}
		child, target, err := t.child(d, name, keep...)
		if t.mustExist && errors.Is(err, unix.ENOENT) {
			return nil, &missing{d, tidy(name + "/" + todo)}
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
		if t.linked -= 1 + strings.Count(target, "/"); t.linked < 0 {
			return nil, invalid("symbolic links lead through too many directories: more than %d and %d for each entry", linkedDirs, linkedDirsPerEntry)
		}
		todo = target + "/" + todo
		if len(todo) > 2*layer.MaxPath {
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

// child opens or creates the directory name in d. If name is a symbolic link it returns its target instead.
func (t *tree) child(d *dir, name string, keep ...*dir) (*dir, string, error) {
	if c, ok := t.open[t.under(d.hash, name)]; ok {
		return c, "", nil
	}
	p := join(d.path, name)
	fd, err := openBeneath(d.fd, name)
	if errors.Is(err, unix.EACCES) && !t.privileged {
		fd, err = sys.OpenForbidden(d.fd, name, 0)
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
			t.made++
			t.implied(p)
		}
		return c, "", err
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		buf := make([]byte, layer.MaxPath+1)
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
		return nil, "", invalid("%s is not a directory", quote(p))
	}
	return nil, "", err
}

// remove removes name in d and everything below it.
func (t *tree) remove(d *dir, name string) error {
	var st unix.Stat_t
	if err := sys.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ignore(err, unix.ENOENT)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		t.reapply(join(d.path, name), "a directory is replaced by a file")
		t.drop(join(d.path, name))
		return sys.RemoveAll(d.fd, name)
	case unix.S_IFLNK:
		clear(t.links)
	}
	return sys.Unlinkat(d.fd, name, 0)
}

// drop forgets a directory that is about to be removed, everything below it, and all links.
func (t *tree) drop(p string) {
	clear(t.links)
	for h, d := range t.open {
		if rest, ok := strings.CutPrefix(d.path, p); ok && (rest == "" || rest[0] == '/') {
			_ = unix.Close(d.fd)
			delete(t.open, h)
		}
	}
}

// isOpen reports whether a directory is still open since it was looked up.
func (t *tree) isOpen(d *dir) bool { return d == t.root || t.open[d.hash] == d }

// makeRoom makes sure that one more directory may be opened.
func (t *tree) makeRoom(keep ...*dir) error {
	if len(t.open) < maxOpen {
		return nil
	}
	return t.closeAll(keep...)
}

// closeAll closes all directories but the target and those in keep, and restores their times and modes.
func (t *tree) closeAll(keep ...*dir) error {
	var first error
	for h, d := range t.open {
		if slices.Contains(keep, d) {
			continue
		}
		if err := d.close(); err != nil && first == nil {
			first = fmt.Errorf("%s: %w", quote(d.path), err)
		}
		delete(t.open, h)
	}
	return first
}

// finish closes all directories and restores their times and modes.
func (t *tree) finish() error {
	return errors.Join(t.closeAll(), t.root.close())
}

// abandon closes all directories as they are.
func (t *tree) abandon() {
	for _, d := range t.open {
		_ = unix.Close(d.fd)
	}
	clear(t.open)
	_ = unix.Close(t.root.fd)
}

// openBeneath opens the directory at a relative path without symbolic links.
func openBeneath(fd int, p string) (int, error) { return sys.OpenBeneath(fd, p, sys.OpenDir, 0) }

func ignore(err error, ignored ...error) error {
	for _, i := range ignored {
		if errors.Is(err, i) {
			return nil
		}
	}
	return err
}

func cleanAll(names []string) (list []string) {
	for _, n := range names {
		list = append(list, layer.Clean(n))
	}
	return list
}
