package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"strings"
	"time"

	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// whiteout writes a whiteout for a name in dir. lower is the file that it hides, if known.
func (d *differ) whiteout(dir *node, name string, lower *node) error {
	path := join(dir.path, name)
	if !d.selected.has(path, false) || d.hidesUnselected(path, lower) {
		return nil
	}
	if strings.HasPrefix(name, layer.WhiteoutPrefix) {
		return (&node{path: path}).fail("remove", unsupported("a layer can't remove a file with such a name"))
	}
	return d.mark(dir, layer.WhiteoutPrefix+name)
}

// hidesUnselected reports whether an entry at a path, which is not a directory, would hide files that are left out:
// those below a directory in lower, or of an overlay's lower layers, which are not read.
func (d *differ) hidesUnselected(path string, lower *node) bool {
	return (d.opts.Overlay || lower != nil && lower.isDir()) && !d.selected.whole(path)
}

func (d *differ) mark(dir *node, name string) error {
	if err := d.writeParents(dir); err != nil {
		return err
	}
	return d.header(&tar.Header{Typeflag: tar.TypeReg, Name: join(dir.path, name), ModTime: time.Unix(0, 0)})
}

func unsupported(text string) error { return errclass.As(errors.New(text), errdefs.ErrNotImplemented) }

// writeParents writes entries for a directory and its parents, as far as the layer has none.
func (d *differ) writeParents(dir *node) error {
	if dir == nil || dir.written {
		return nil
	}
	if err := d.writeParents(dir.parentNode); err != nil {
		return err
	}
	dir.written = true
	return d.write(dir)
}

// write writes the entry of a file or directory.
func (d *differ) write(n *node) error {
	if err := d.writeParents(n.parentNode); err != nil {
		return err
	}
	if strings.HasPrefix(n.name, layer.WhiteoutPrefix) && !d.opts.Archive {
		return n.fail("write", unsupported("a layer can't hold a file with such a name"))
	}
	if err := d.readXattrs(n); err != nil {
		if d.opts.Archive && vanished(err) {
			return nil
		}
		return err
	}
	if _, ok := n.overlay["whiteout"]; ok && n.kind() == unix.S_IFREG && n.parentNode != nil {
		return d.whiteout(n.parentNode, n.name, nil)
	}
	h, err := d.newHeader(n)
	if err != nil {
		return err
	}
	if !n.isDir() && n.st.Nlink > 1 {
		if first, ok := d.links[n.inode()]; ok {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
			return d.header(h)
		}
		d.links[n.inode()] = n.path
	}
	switch n.kind() {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if n.path == "" {
			h.Name = "./"
		}
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, n.st.Size
		return d.file(n, h)
	case unix.S_IFLNK:
		target, err := n.readlink()
		if d.opts.Archive && vanished(err) {
			delete(d.links, n.inode())
			return nil
		}
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if n.kind() == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(n.st.Rdev)), int64(unix.Minor(n.st.Rdev))
	default:
		return n.fail("write", unsupported(fmt.Sprintf("a layer can't hold a file of type %o", n.kind())))
	}
	return d.header(h)
}

// newHeader returns a header with the attributes of a file, but without its type.
func (d *differ) newHeader(n *node) (*tar.Header, error) {
	uid, gid, err := d.ownerOf(n)
	if err != nil {
		return nil, err
	}
	h := &tar.Header{
		Name: n.path,
		Mode: int64(n.st.Mode & 0o7777),
		Uid:  int(uid), Gid: int(gid),
		ModTime: time.Unix(n.st.Mtim.Unix()),
	}
	if !d.opts.Latest.IsZero() && h.ModTime.After(d.opts.Latest) {
		h.ModTime = d.opts.Latest
	}
	if len(n.xattrs) > 0 {
		h.PAXRecords = map[string]string{}
		for _, x := range n.xattrs {
			if x.Name == ownerAttribute && !d.chowns {
				continue
			}
			if x.Name == capabilityAttribute && len(d.opts.UIDs) > 0 {
				v, ok := mapCapability(x.Value, d.opts.UIDs.layer)
				if !ok {
					return nil, n.fail("write", overLimit("the root of its capabilities is not mapped to one of the layer"))
				}
				x.Value = v
			}
			h.PAXRecords[layer.XattrRecord+layer.EscapeName(x.Name)] = string(x.Value)
		}
	}
	return h, nil
}

// header writes an entry's header, in plain USTAR if that suffices.
func (d *differ) header(h *tar.Header) error {
	if len(h.Name) > layer.MaxPath {
		return fmt.Errorf("write %s: %w", quote(h.Name), unsupported(fmt.Sprintf("path of %d bytes", len(h.Name))))
	}
	if h.ModTime.Nanosecond() != 0 {
		h.Format = tar.FormatPAX
	}
	if err := d.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", quote(h.Name), err)
	}
	return nil
}

func (d *differ) file(n *node, h *tar.Header) error {
	open := n.openFile
	if d.opts.Archive {
		n.named = d.isNamed(n)
		open = n.openNow
	}
	fd, err := open()
	if d.opts.Archive && errors.Is(err, unix.ENOENT) {
		delete(d.links, n.inode())
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	h.Size = n.st.Size
	if err := d.header(h); err != nil {
		return err
	}
	for left := h.Size; left > 0; {
		if err := d.ctx.Err(); err != nil {
			return err
		}
		b := d.buffers[0][:min(left, compareSize)]
		// If the file has become shorter the rest of its entry is zeros, as in GNU tar.
		if err := n.readFull(fd, b); err != nil && (!d.opts.Archive || !errors.Is(err, errShorter)) {
			return err
		}
		if _, err := d.tar.Write(b); err != nil {
			return fmt.Errorf("write %s: %w", quote(h.Name), err)
		}
		left -= int64(len(b))
	}
	if d.opts.Archive {
		return nil
	}
	return n.unchanged(fd)
}
