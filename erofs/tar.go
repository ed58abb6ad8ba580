package erofs

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"time"
	"unicode/utf8"

	"distkit/layer"
	"distkit/layer/tree"
)

// TarOptions describe what the archive's reader supports. The zero value is for a reader that supports everything.
type TarOptions struct {
	// Holds, if not nil, reports whether a file that has the attributes in before can have x too. An attribute that it
	// can't have is left out and counted by [Builder.Unset].
	Holds func(before []layer.Xattr, x layer.Xattr) bool
	// Earliest and Latest bound the times of files, in seconds, unless both are 0. A time out of range is replaced by
	// the nearest in range, and counted.
	Earliest, Latest int64
	// NineDigits is for a reader that takes the fraction of a time for a count of nanoseconds, however many digits it
	// has: .5 for 5 ns. Trailing zeros are not written to the archive. So a time that ends with a zero is made one
	// nanosecond later, and counted.
	NineDigits bool
}

// WriteTar writes the merged tree to w as one tar archive without whiteouts. The root directory comes first, as "./".
// The entries of each directory are in the order of their bytes. The first name of a file has its data; its other names
// are hard links to that. The holes of sparse files are written as zeros. The same layers give the same bytes.
//
// The Builder must be one of a complete image. WriteTar may be called more than once. NotImplemented: something was
// left out, and Options.Strict is set; the archive then has no end.
func (b *Builder) WriteTar(ctx context.Context, w io.Writer, o TarOptions) error {
	if b.opts.Index || b.opts.Overlay {
		return refused("an archive is made of complete layers without whiteouts")
	}
	if err := b.strict(); err != nil {
		return err
	}
	a := &archiver{Builder: b, opts: o, links: map[*inode]tree.Entry{}, buffer: make([]byte, bufferSize),
		out: output{ctx: ctx, w: w, buffer: make([]byte, 0, bufferSize)}}
	a.tar = tar.NewWriter(&a.out)
	if err := b.walk(tree.Root, "", a.write); err != nil {
		return err
	}
	if err := a.tar.Close(); err != nil {
		return err
	}
	if err := b.strict(); err != nil {
		return err
	}
	return a.out.flush()
}

// walk calls f with every name from e on: a directory before its entries, and these in the order of their bytes. The
// root directory's path is "".
func (b *Builder) walk(e tree.Entry, path string, f func(e tree.Entry, path string) error) error {
	if err := f(e, path); err != nil || b.tree.Kind(e) != tree.Dir {
		return err
	}
	if path != "" {
		path += "/"
	}
	for _, c := range b.tree.Children(e, nil) {
		if err := b.walk(c, path+string(b.tree.Name(c)), f); err != nil {
			return err
		}
	}
	return nil
}

// An archiver writes a tree as an archive.
type archiver struct {
	*Builder
	opts   TarOptions
	out    output
	tar    *tar.Writer
	links  map[*inode]tree.Entry // the first name of a file that has several
	buffer []byte
}

func (a *archiver) write(e tree.Entry, path string) error {
	n := a.tree.File(e)
	h := &tar.Header{Name: path, Mode: int64(n.mode &^ typeMask), Uid: int(n.uid), Gid: int(n.gid)}
	if !n.isDir() && a.tree.Links(e) > 1 {
		if first, ok := a.links[n]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, a.tree.Path(first)
			h.ModTime, _ = a.time(n)
			return a.header(h)
		}
		a.links[n] = e
	}
	var changed bool
	if h.ModTime, changed = a.time(n); changed {
		a.unset["times"]++
	}
	a.xattrs(h, n)
	switch n.mode & typeMask {
	case typeDir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if path == "" {
			h.Name = "./"
		}
	case typeFile:
		h.Typeflag, h.Size = tar.TypeReg, n.size
		if err := a.header(h); err != nil {
			return err
		}
		return a.content(n)
	case typeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, a.tree.Target(e)
	case typeFifo:
		h.Typeflag = tar.TypeFifo
	case typeChar, typeBlock:
		h.Typeflag = tar.TypeChar
		if n.mode&typeMask == typeBlock {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(n.number>>8&0xfff), int64(n.number&0xff|n.number>>12&^0xff)
	}
	return a.header(h)
}

// time returns the time of a file as far as the archive's reader supports it. It reports whether that differs from the
// file's own time.
func (a *archiver) time(n *inode) (t time.Time, changed bool) {
	if a.opts.Earliest != 0 || a.opts.Latest != 0 {
		if s := min(max(n.seconds, a.opts.Earliest), a.opts.Latest); s != n.seconds {
			return time.Unix(s, 0), true
		}
	}
	t = time.Unix(n.seconds, int64(n.nanoseconds))
	if a.opts.NineDigits && n.nanoseconds != 0 && n.nanoseconds%10 == 0 {
		return t.Add(1), true
	}
	return t, false
}

func (a *archiver) xattrs(h *tar.Header, n *inode) {
	var held []layer.Xattr
	for x := range n.eachXattr {
		if a.opts.Holds != nil && !a.opts.Holds(held, x) {
			a.unset[x.Kind()]++
			continue
		}
		held = append(held, x)
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[layer.XattrRecord+layer.EscapeName(x.Name)] = string(x.Value)
	}
}

// header writes an entry's header, as plain USTAR if that can hold everything.
func (a *archiver) header(h *tar.Header) error {
	if h.ModTime.Nanosecond() != 0 {
		h.Format = tar.FormatPAX
	}
	if !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname) { // PAX records would have to be UTF-8
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["hdrcharset"] = "BINARY"
	}
	if err := a.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("write %.200q: %w", h.Name, err)
	}
	return nil
}

func (a *archiver) content(n *inode) error {
	if !n.isSparse() {
		return a.copy(io.NewSectionReader(a.plain, a.layers[max(n.device, 1)-1].offset+n.offset, n.size))
	}
	at := int64(0)
	if n.rare != nil {
		for _, r := range n.rare.runs {
			if err := a.copy(io.LimitReader(zeros{}, int64(r.chunk)<<sparseBits-at)); err != nil {
				return err
			}
			at = int64(r.chunk) << sparseBits
			size := min(int64(r.chunks)<<sparseBits, n.size-at)
			if err := a.copy(io.NewSectionReader(a.chunks, r.offset, size)); err != nil {
				return err
			}
			at += size
		}
	}
	return a.copy(io.LimitReader(zeros{}, n.size-at))
}

func (a *archiver) copy(r io.Reader) error {
	for {
		n, err := r.Read(a.buffer)
		if n > 0 {
			if _, err := a.tar.Write(a.buffer[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("read temporary file: %w", err)
		}
	}
}

// zeros is an endless reader of zeros.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
