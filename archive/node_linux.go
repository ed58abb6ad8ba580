package archive

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"distkit/disk/sys"
	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

type inode struct{ dev, ino uint64 }

// A node is a file in a tree: a name in an open directory, and its attributes.
type node struct {
	parent int // descriptor of the directory
	name   string
	path   string // relative to the top
	st     unix.Stat_t
	fd     int // of a directory that is open, else -1

	parentNode *node // in the upper tree
	written    bool  // the layer has an entry for this directory
	named      bool  // listed in Only, in an Archive: it may be on another mount
	xattrs     []layer.Xattr
	overlay    map[string][]byte // attributes of overlayfs
	read       bool              // xattrs and overlay are set
}

func (n *node) kind() uint32 { return n.st.Mode & unix.S_IFMT }

func (n *node) isDir() bool { return n.kind() == unix.S_IFDIR }

func (n *node) inode() inode { return inode{uint64(n.st.Dev), n.st.Ino} }

func (n *node) close() {
	if n.fd >= 0 {
		_ = unix.Close(n.fd)
		n.fd = -1
	}
}

func (n *node) fail(verb string, err error) error {
	p := n.path
	if p == "" {
		p = "."
	}
	return fmt.Errorf("%s %s: %w", verb, quote(p), err)
}

func openTop(path string) (*node, error) {
	fd, err := sys.Open(path, sys.OpenDir&^unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		return nil, invalid("open %s: %w", path, err)
	case errors.Is(err, unix.ENOENT):
		return nil, errclass.As(fmt.Errorf("open %s: %w", path, err), errdefs.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	n := &node{fd: fd, parent: -1}
	if err := sys.Fstat(fd, &n.st); err != nil {
		n.close()
		return nil, fmt.Errorf("stat %s: %w", path, err)
	}
	return n, nil
}

// stat describes a name in a directory. It returns nil if the name doesn't exist or is a socket.
func stat(parent int, dir, name string) (*node, error) {
	n := &node{parent: parent, name: name, path: join(dir, name), fd: -1}
	err := sys.Fstatat(parent, name, &n.st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, n.fail("stat", err)
	}
	if n.kind() == unix.S_IFSOCK {
		return nil, nil
	}
	return n, nil
}

// resolve returns the restriction for opening the node: it must be on the same mount, unless Only lists it.
func (n *node) resolve() uint64 {
	if n.named {
		return 0
	}
	return unix.RESOLVE_NO_XDEV
}

// open opens a directory.
func (n *node) open() error {
	if n.fd >= 0 {
		return nil
	}
	fd, err := sys.OpenBeneath(n.parent, n.name, sys.OpenDir, n.resolve())
	if errors.Is(err, unix.EXDEV) {
		return n.fail("open", errclass.As(sys.ErrMounted, errdefs.ErrFailedPrecondition))
	}
	if err != nil {
		return n.fail("open", err)
	}
	n.fd = fd
	return nil
}

// openFile opens a regular file, and checks that it is still the one that was found.
func (n *node) openFile() (int, error) {
	fd, err := sys.Openat(n.parent, n.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, n.fail("open", err)
	}
	if err := n.unchanged(fd); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openNow opens a regular file that may have changed since it was found. ENOENT if the name is another file's by now or
// is mounted over. It opens only regular files, because opening a device can have effects.
func (n *node) openNow() (int, error) {
	place, err := sys.OpenBeneath(n.parent, n.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, n.resolve())
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ELOOP) {
		err = unix.ENOENT
	}
	if err != nil {
		return -1, n.fail("open", err)
	}
	defer unix.Close(place)
	var st unix.Stat_t
	if err := sys.Fstat(place, &st); err != nil {
		return -1, n.fail("stat", err)
	}
	if st.Dev != n.st.Dev || st.Ino != n.st.Ino || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, n.fail("open", unix.ENOENT)
	}
	n.st = st
	fd, err := sys.Openat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", place), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, n.fail("open", err)
	}
	return fd, nil
}

// vanished reports whether an error means that a name is no longer what it was.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.EINVAL)
}

func (n *node) unchanged(fd int) error {
	var st unix.Stat_t
	if err := sys.Fstat(fd, &st); err != nil {
		return n.fail("stat", err)
	}
	if st.Dev != n.st.Dev || st.Ino != n.st.Ino || st.Mode != n.st.Mode || st.Size != n.st.Size || st.Mtim != n.st.Mtim {
		return n.fail("read", errors.New("changed while it was read"))
	}
	return nil
}

// sortedNames returns the sorted names in a directory.
func sortedNames(fd int, dir string) ([]string, error) {
	if fd < 0 {
		return nil, nil
	}
	names, err := sys.Names(fd)
	if err != nil {
		return nil, (&node{path: dir}).fail("read directory", err)
	}
	slices.Sort(names)
	return names, nil
}

func (n *node) readFull(fd int, p []byte) error {
	for len(p) > 0 {
		m, err := sys.Read(fd, p)
		if err != nil {
			return n.fail("read", err)
		}
		if m == 0 {
			clear(p)
			return n.fail("read", errShorter)
		}
		p = p[m:]
	}
	return nil
}

var errShorter = errors.New("changed while it was read")

func (n *node) readlink() (string, error) {
	buf := make([]byte, layer.MaxPath+1)
	m, err := sys.Readlinkat(n.parent, n.name, buf)
	if err != nil {
		return "", n.fail("read link", err)
	}
	return string(buf[:m]), nil
}

// hostXattrs are attributes that belong to the host or its file system. The list is umoci's.
var hostXattrs = []string{"security.selinux", "security.ima", "security.evm", "system.nfs4_acl"}

// readXattrs reads the attributes that go into the layer, sorted, and those of overlayfs.
func (d *differ) readXattrs(n *node) error {
	if n.read {
		return nil
	}
	n.read = true
	names, err := n.listXattrs()
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == "" || slices.Contains(hostXattrs, name) {
			continue
		}
		rest, overlay := layer.OverlayName(name)
		if d.opts.Archive && overlay {
			overlay = strings.HasPrefix(name, "trusted.")
			if overlay {
				continue // set by overlayfs in the upper directory of a mount
			}
		}
		if overlay && !slices.Contains(overlayMarks, rest) {
			continue
		}
		v, err := n.xattr(name)
		switch {
		case err != nil:
			return err
		case v == nil: // removed since listXattrs
		case !overlay:
			n.xattrs = append(n.xattrs, layer.Xattr{Name: name, Value: v})
		case !d.opts.Overlay:
			return n.notUpper("has the overlayfs attribute " + quote(name))
		case rest == "metacopy" || rest == "redirect":
			return n.fail("read", unsupported("has the overlayfs attribute "+quote(name)+", so its content is elsewhere: mount with metacopy=off,redirect_dir=off"))
		default:
			if n.overlay == nil {
				n.overlay = map[string][]byte{}
			}
			n.overlay[rest] = v
		}
	}
	return nil
}

// overlayMarks are the attributes by which overlayfs shows a file differently from what it is.
var overlayMarks = []string{"opaque", "whiteout", "metacopy", "redirect"}

func (n *node) notUpper(what string) error {
	return errclass.As(n.fail("read", errors.New(what+": read it as the upper directory of an overlay")), errdefs.ErrInvalidArgument)
}

// procPath returns a path of the node itself in its open directory. It doesn't follow a symbolic link at name.
func (n *node) procPath() string { return fmt.Sprintf("/proc/self/fd/%d/%s", n.parent, n.name) }

func (n *node) listXattrs() ([]string, error) {
	b, err := sys.Grow(func(buf []byte) (int, error) {
		if n.fd >= 0 {
			return unix.Flistxattr(n.fd, buf)
		}
		return unix.Llistxattr(n.procPath(), buf)
	})
	if err != nil {
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		return nil, n.fail("list attributes of", err)
	}
	names := strings.Split(string(b), "\x00")
	slices.Sort(names)
	return names, nil
}

// xattr returns the value of an attribute, or nil if it doesn't exist.
func (n *node) xattr(name string) ([]byte, error) {
	b, err := sys.Grow(func(buf []byte) (int, error) {
		if n.fd >= 0 {
			return unix.Fgetxattr(n.fd, name, buf)
		}
		return unix.Lgetxattr(n.procPath(), name, buf)
	})
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP),
		errors.Is(err, unix.EPERM): // user attributes of files other than regular files and directories
		return nil, nil
	case err != nil:
		return nil, n.fail("read attribute "+quote(name)+" of", err)
	}
	return b, nil
}
