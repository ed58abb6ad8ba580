package look

import (
	"archive/tar"
	"cmp"
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"time"

	"distkit/errclass"
	"distkit/layer"
	"distkit/layer/tree"

	"github.com/containerd/errdefs"
)

// Files finds files of an image, and reads their contents.
type Files struct {
	layers []Layer
	tree   *tree.Tree[origin]
	dirs   map[*origin]directory
	kept   map[*origin][]byte // contents of small files
	free   int64              // the bytes of contents that may still be kept
}

// While layers are merged, the contents of small files that may be asked for are kept, so that most files are read
// once.
const maxKept, maxKeptTogether = 1 << 20, 8 << 20

// An origin is the entry that made a file: the layer and the number of the entry in it, both counted from 0.
type origin struct {
	layer  uint16
	large  bool // the content has more than maxKept bytes
	number uint32
}

// A directory has the attributes in a directory's entry, without the name.
type directory struct {
	mode     int64
	uid, gid int
	time     time.Time
	xattrs   []layer.Xattr
}

// dirMemory is the memory that a directory takes, without its attributes.
const dirMemory = 192

// Open merges layers to find files in. The tree may take maxMemory bytes, or any number if that is 0. If paths are
// given, Cat can be called only with these; the lowest layers are then not read if those above them decide where the
// paths lead. Errors are those of [Read], for the layers that are read.
func Open(ctx context.Context, layers []Layer, maxMemory int64, paths ...string) (*Files, error) {
	total, twice := int64(0), int64(0)
	for _, l := range layers {
		total += l.Size
	}
	for n := 1; n < len(layers) && len(paths) > 0; n *= 2 {
		lower, top := layers[:len(layers)-n], layers[len(layers)-n:]
		for _, l := range top {
			if _, ok := l.Source.(Lister); !ok {
				twice += l.Size
			}
		}
		if twice > total/8 || !slices.ContainsFunc(lower, func(l Layer) bool { return !listed(l) }) {
			break
		}
		s, err := open(ctx, top, maxMemory, paths...)
		if err == nil && s.decides(paths) {
			return s, nil
		}
		if err != nil && !errdefs.IsInvalidArgument(err) { // the entries that are missing may be in the layers below
			return nil, err
		}
	}
	return open(ctx, layers, maxMemory, paths...)
}

// A Lister is a Source that can return the entries of a layer without reading the layer, if Listed is true. It is true
// at the latest after the first Walk.
type Lister interface{ Listed() bool }

func listed(l Layer) bool {
	s, ok := l.Source.(Lister)
	return ok && s.Listed()
}

// decides reports whether the layers decide where paths lead, whatever is in layers below. They do if every directory
// has an entry before the entries in it, because a path through a directory without one may lead through a symbolic
// link of a lower layer. The paths must exist, too.
func (s *Files) decides(paths []string) bool {
	return s.tree.Implied() == 0 && !slices.ContainsFunc(paths, func(p string) bool {
		_, err := s.tree.Lookup(p, true)
		return errdefs.IsNotFound(err)
	})
}

func open(ctx context.Context, layers []Layer, maxMemory int64, paths ...string) (*Files, error) {
	s := &Files{layers: layers, tree: tree.New(tree.Options[origin]{MaxMemory: maxMemory}), dirs: map[*origin]directory{},
		kept: map[*origin][]byte{}, free: maxKeptTogether}
	wanted := map[string]bool{}
	for _, p := range paths {
		wanted[path.Base(p)] = true
	}
	err := Merge(ctx, layers, s.tree, func(l int, n int64, c tree.Change, h *tar.Header, content io.Reader) error {
		if c.Action != tree.Made && c.Action != tree.Merged {
			return nil
		}
		f, kind := s.tree.File(c.Entry), s.tree.Kind(c.Entry)
		*f = origin{uint16(l), h.Size > maxKept, uint32(n)}
		if content != Unread && kind == tree.Regular && wanted[string(s.tree.Name(c.Entry))] {
			return s.keep(f, h.Size, content)
		}
		if kind != tree.Dir {
			return nil
		}
		xattrs, err := layer.Xattrs(h.PAXRecords)
		if err != nil {
			return err
		}
		s.dirs[f] = directory{h.Mode, h.Uid, h.Gid, h.ModTime, xattrs}
		size := dirMemory
		for _, x := range xattrs {
			size += xattrMemory + len(x.Name) + len(x.Value)
		}
		return s.tree.Charge(int64(size))
	}, nil)
	if err == nil && len(paths) > 1 {
		s.prefetch(ctx, paths)
	}
	return s, err
}

// prefetch keeps the contents of the files to which several paths lead, so that each layer is read once for all of
// them. It ignores errors, which Cat will find again.
func (s *Files) prefetch(ctx context.Context, paths []string) {
	wanted := make([][]*origin, len(s.layers))
	for _, p := range paths {
		e, err := s.tree.Lookup(p, true)
		if err != nil || s.tree.Kind(e) != tree.Regular {
			continue
		}
		f := s.tree.File(e)
		if _, kept := s.kept[f]; !kept && !f.large {
			wanted[f.layer] = append(wanted[f.layer], f)
		}
	}
	for l, files := range wanted {
		if len(files) == 0 {
			continue
		}
		slices.SortFunc(files, func(a, b *origin) int { return cmp.Compare(a.number, b.number) })
		files = slices.Compact(files)
		numbers, next := make([]int64, len(files)), 0
		for i, f := range files {
			numbers[i] = int64(f.number)
		}
		err := s.layers[l].Walk(ctx, numbers, func(_ int64, h *tar.Header, content io.Reader) error {
			next++
			return s.keep(files[next-1], h.Size, content)
		})
		if err != nil {
			for _, f := range files {
				delete(s.kept, f)
			}
		}
	}
}

// keep keeps a file's content, unless the content is too large.
func (s *Files) keep(f *origin, size int64, content io.Reader) error {
	if size > maxKept || size > s.free {
		return nil
	}
	s.free -= size
	b, err := io.ReadAll(content)
	s.kept[f] = b
	return err
}

// Cat writes the content of the regular file to which a path leads. It follows symbolic links inside the image.
// NotFound: the file does not exist. InvalidArgument: it is not a regular file. After any other error, the bytes that
// were written are not verified.
func (s *Files) Cat(ctx context.Context, path string, w io.Writer) error {
	e, err := s.tree.Lookup(path, true)
	if err == nil && s.tree.Kind(e) != tree.Regular {
		err = errclass.Errorf(errdefs.ErrInvalidArgument, "it is a %s, not a regular file", types[s.tree.Kind(e)])
	}
	if err != nil {
		return fmt.Errorf("%.200q: %w", path, err)
	}
	if b, kept := s.kept[s.tree.File(e)]; kept {
		_, err := w.Write(b)
		return err
	}
	from := *s.tree.File(e)
	return s.layers[from.layer].Walk(ctx, []int64{int64(from.number)}, func(_ int64, _ *tar.Header, content io.Reader) error {
		_, err := io.Copy(w, content)
		return err
	})
}

// Tar writes an archive of files, and of directories with everything below them. It follows symbolic links in each
// path, except for the last component. In the archive, directories come first, and hard links after the files they
// refer to. Errors are those of Cat.
func (s *Files) Tar(ctx context.Context, paths []string, w io.Writer) error {
	t := &archiver{Files: s, w: tar.NewWriter(w), seen: map[tree.Entry]bool{}, first: map[origin]tree.Entry{}, files: make([][]tree.Entry, len(s.layers))}
	for _, p := range paths {
		e, err := s.tree.Lookup(p, false)
		if err == nil {
			err = t.add(e)
		}
		if err != nil {
			return fmt.Errorf("%.200q: %w", p, err)
		}
	}
	for l := range t.files {
		if err := t.contents(ctx, l); err != nil {
			return err
		}
	}
	for _, e := range t.links {
		h := &tar.Header{Typeflag: tar.TypeLink, Name: s.tree.Path(e), Linkname: s.tree.Path(t.first[*s.tree.File(e)])}
		if err := t.w.WriteHeader(h); err != nil {
			return err
		}
	}
	return t.w.Close()
}

// An archiver writes an archive of some files.
type archiver struct {
	*Files
	w     *tar.Writer
	seen  map[tree.Entry]bool
	first map[origin]tree.Entry // for each file with several names, the name that has the content
	files [][]tree.Entry        // by layer
	links []tree.Entry
}

// add writes directories, and records the files to be written later.
func (t *archiver) add(e tree.Entry) error {
	if t.seen[e] {
		return nil
	}
	t.seen[e] = true
	if err := t.tree.Charge(32); err != nil {
		return err
	}
	from := *t.tree.File(e)
	if t.tree.Kind(e) == tree.Dir {
		d, ok := t.dirs[t.tree.File(e)]
		if !ok {
			d.mode = 0o755
		}
		h := &tar.Header{Typeflag: tar.TypeDir, Mode: d.mode, Uid: d.uid, Gid: d.gid, ModTime: d.time}
		if err := t.write(h, d.xattrs, cmp.Or(t.tree.Path(e), ".")+"/"); err != nil {
			return err
		}
		for _, c := range t.tree.Children(e, nil) {
			if err := t.add(c); err != nil {
				return err
			}
		}
		return nil
	}
	if t.tree.Links(e) > 1 {
		if _, written := t.first[from]; written {
			t.links = append(t.links, e)
			return nil
		}
		t.first[from] = e
	}
	t.files[from.layer] = append(t.files[from.layer], e)
	return nil
}

// contents writes the files of one layer.
func (t *archiver) contents(ctx context.Context, l int) error {
	files := t.files[l]
	if len(files) == 0 {
		return nil
	}
	slices.SortFunc(files, func(a, b tree.Entry) int { return cmp.Compare(t.tree.File(a).number, t.tree.File(b).number) })
	numbers := make([]int64, len(files))
	for i, e := range files {
		numbers[i] = int64(t.tree.File(e).number)
	}
	return t.layers[l].Walk(ctx, numbers, func(_ int64, h *tar.Header, content io.Reader) error {
		e := files[0]
		files = files[1:]
		xattrs, err := layer.Xattrs(h.PAXRecords)
		if err == nil {
			err = t.write(h, xattrs, t.tree.Path(e))
		}
		if err != nil {
			return err
		}
		if t.tree.Kind(e) != tree.Regular {
			return nil
		}
		_, err = io.Copy(t.w, content)
		return err
	})
}

// write writes a header with another name and with these attributes, and without other records.
func (t *archiver) write(from *tar.Header, xattrs []layer.Xattr, name string) error {
	h := &tar.Header{Typeflag: from.Typeflag, Name: name, Linkname: from.Linkname, Size: from.Size, Mode: from.Mode & 0o7777, Uid: from.Uid, Gid: from.Gid,
		ModTime: from.ModTime, Devmajor: from.Devmajor, Devminor: from.Devminor}
	if flags[h.Typeflag] == File {
		h.Typeflag = tar.TypeReg
	} else {
		h.Size = 0
	}
	if h.ModTime.Nanosecond() != 0 {
		h.Format = tar.FormatPAX
	}
	h.PAXRecords = make(map[string]string, len(xattrs))
	for _, x := range xattrs {
		if x.Value != nil {
			h.PAXRecords[layer.XattrRecord+layer.EscapeName(x.Name)] = string(x.Value)
		}
	}
	return t.w.WriteHeader(h)
}
