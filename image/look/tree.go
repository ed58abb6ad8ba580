package look

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"distkit/errclass"
	"distkit/layer"
	"distkit/layer/tree"

	"github.com/containerd/errdefs"
)

// A Tree has the files of merged layers, with the attributes that are listed. A file with a name of 12 bytes takes
// about 35 bytes of memory.
type Tree struct {
	files  *tree.Tree[file]
	common map[common]uint32
	listed []common // by number
	xattrs map[*file][]layer.Xattr
	sums   sums
}

// A file has the attributes of a file in as few bytes as possible: the number of those that it shares with others, and
// the low bytes of its time in seconds and of its size or device.
type file struct{ common, size, time [3]byte }

// common has the attributes that many files share: the mode, the owner, and the high bytes of size and time.
type common struct {
	perm     uint16
	size     uint16
	time     int16
	uid, gid uint32
}

// commonMemory is the memory that a common takes, and xattrMemory that of an attribute without its name and value.
const commonMemory, xattrMemory = 80, 128

// maxSize is larger than the size that a layer's sparse files may have, and than any other file that can be read. Times
// have as many bits, and a sign.
const maxSize = 1<<39 - 1

func newTree(maxMemory int64, deleted func(tree.Entry)) *Tree {
	t := &Tree{common: map[common]uint32{{perm: 0o755}: 0}, listed: []common{{perm: 0o755}}, xattrs: map[*file][]layer.Xattr{}}
	t.files = tree.New(tree.Options[file]{MaxMemory: maxMemory, Deleted: deleted})
	return t
}

// number returns the number of the shared attributes. Number 0 is for directories without an entry. FailedPrecondition:
// there are too many, or they take too much memory.
func (t *Tree) number(c common) (uint32, error) {
	n, known := t.common[c]
	if known {
		return n, nil
	}
	if n = uint32(len(t.listed)); n >= 1<<24 {
		return 0, errclass.Errorf(errdefs.ErrFailedPrecondition, "more than %d modes, owners, sizes and times", n)
	}
	t.common[c] = n
	t.listed = append(t.listed, c)
	return n, t.files.Charge(commonMemory)
}

// set sets a file's attributes to those of its entry. InvalidArgument: no file can have these.
func (t *Tree) set(e tree.Entry, h *tar.Header) error {
	const most = 1<<32 - 1
	if h.Uid < 0 || h.Uid >= most || h.Gid < 0 || h.Gid >= most {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "owner %d:%d is out of range", h.Uid, h.Gid)
	}
	var size int64
	switch t.files.Kind(e) {
	case tree.Regular:
		if size = h.Size; size > maxSize {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "a file of %d bytes", h.Size)
		}
	case tree.Char, tree.Block:
		size = h.Devmajor<<20 | h.Devminor
	}
	seconds := min(max(h.ModTime.Unix(), -maxSize), maxSize)
	n, err := t.number(common{uint16(h.Mode & 0o7777), uint16(size >> 24), int16(seconds >> 24), uint32(h.Uid), uint32(h.Gid)})
	if err != nil {
		return err
	}
	f := t.files.File(e)
	*f = file{pack(int64(n)), pack(size), pack(seconds)}
	delete(t.xattrs, f)
	xattrs, err := layer.Xattrs(h.PAXRecords)
	if err != nil || len(xattrs) == 0 {
		return err
	}
	for _, x := range xattrs {
		if err := t.files.Charge(int64(xattrMemory + len(x.Name) + len(x.Value))); err != nil {
			return err
		}
	}
	t.xattrs[f] = xattrs
	return nil
}

// pack returns the low 24 bits of a number.
func pack(v int64) [3]byte { return [3]byte{byte(v), byte(v >> 8), byte(v >> 16)} }

func unpack(b [3]byte) int64 { return int64(b[0]) | int64(b[1])<<8 | int64(b[2])<<16 }

// Options are options for [Read].
type Options struct {
	MaxMemory int64 // the memory that the tree may take, in bytes; 0: any
	Hash      bool  // hash the contents of files, for [Diff]
	// Change, if not nil, is called for each file that a layer adds, changes or deletes, in the order of the archive,
	// with deletions at the end of the layer. It is called twice for a name that a layer has twice. For a directory
	// that is deleted, it is not called for the files in it.
	Change func(*Entry) error
}

// Read merges layers. InvalidArgument: a layer has an entry that no layer may have. FailedPrecondition: the tree takes
// too much memory. Other errors are those of the layers' sources.
func Read(ctx context.Context, layers []Layer, opts Options) (*Tree, error) {
	var deleted []tree.Entry
	note := func(e tree.Entry) { deleted = append(deleted, e) }
	if opts.Change == nil {
		note = nil
	}
	t := newTree(opts.MaxMemory, note)
	hash := newHasher()
	err := Merge(ctx, layers, t.files, func(_ int, _ int64, c tree.Change, h *tar.Header, content io.Reader) error {
		switch c.Action {
		case tree.Made, tree.Merged:
			if err := t.set(c.Entry, h); err != nil {
				return err
			}
			if opts.Hash && t.files.Kind(c.Entry) == tree.Regular {
				s, err := hash.sum(content)
				if err == nil {
					err = t.files.Charge(t.sums.set(t.files.Number(c.Entry), s))
				}
				if err != nil {
					return err
				}
			}
		case tree.Linked:
		default:
			return nil
		}
		if opts.Change == nil {
			return nil
		}
		e := t.entry(c.Entry)
		if e.Change = "A"; c.Lower {
			e.Change = "C"
		}
		return opts.Change(e)
	}, func(l int) error {
		for _, e := range deleted {
			if t.files.Kind(e) != tree.Gone {
				continue // the same layer has made it again
			}
			if err := opts.Change(&Entry{Path: "/" + t.files.Path(e), Type: Whiteout, Layer: l + 1, Change: "D"}); err != nil {
				return err
			}
		}
		deleted = deleted[:0]
		return nil
	})
	return t, err
}

// entry describes a file by one of its names.
func (t *Tree) entry(e tree.Entry) *Entry { return t.describe(e, "/"+t.files.Path(e)) }

func (t *Tree) describe(e tree.Entry, path string) *Entry {
	f, kind := t.files.File(e), t.files.Kind(e)
	c := t.listed[unpack(f.common)]
	v := &Entry{Path: path, Type: types[kind], Perm: c.perm, UID: int(c.uid), GID: int(c.gid), ModTime: time.Unix(int64(c.time)<<24|unpack(f.time), 0).UTC(),
		Links: t.files.Links(e), Layer: t.files.Layer(e), Xattrs: t.xattrs[f], sum: t.sums.at(t.files.Number(e))}
	switch size := int64(c.size)<<24 | unpack(f.size); kind {
	case tree.Regular:
		v.Size = size
	case tree.Symlink:
		v.Target = t.files.Target(e)
		v.Size, v.Perm = int64(len(v.Target)), 0o777
	case tree.Char, tree.Block:
		v.Device = [2]int64{size >> 20, size & (1<<20 - 1)}
	}
	return v
}

// List calls f with the file at a path. It follows symbolic links in the path, except for the last component. For a
// directory it calls f with the entries in it instead, sorted, and with everything below them if recursive is true. The
// root directory itself is listed only if recursive is true. Errors are those of [tree.Tree.Lookup].
func (t *Tree) List(path string, recursive bool, f func(*Entry) error) error {
	e, err := t.files.Lookup(path, false)
	if err != nil {
		return fmt.Errorf("%.200q: %w", path, err)
	}
	if t.files.Kind(e) == tree.Symlink && strings.HasSuffix(path, "/") {
		if e, err = t.files.Lookup(path, true); err != nil {
			return fmt.Errorf("%.200q: %w", path, err)
		}
	}
	if t.files.Kind(e) != tree.Dir {
		return f(t.entry(e))
	}
	if recursive {
		if err := f(t.entry(e)); err != nil {
			return err
		}
	}
	return t.list(e, strings.TrimSuffix("/"+t.files.Path(e), "/"), recursive, f)
}

func (t *Tree) list(dir tree.Entry, path string, recursive bool, f func(*Entry) error) error {
	for _, e := range t.files.Children(dir, nil) {
		p := path + "/" + string(t.files.Name(e))
		if err := f(t.describe(e, p)); err != nil {
			return err
		}
		if recursive && t.files.Kind(e) == tree.Dir {
			if err := t.list(e, p, true, f); err != nil {
				return err
			}
		}
	}
	return nil
}
