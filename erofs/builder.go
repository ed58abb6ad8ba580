package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"distkit/layer"

	"github.com/opencontainers/go-digest"
)

// Options change what a Builder does. The zero value makes a complete image.
type Options struct {
	// Index makes an image that refers to the layers' plain archives for the data of files.
	Index bool
	// Overlay keeps whiteouts in the form that overlayfs reads in a lower directory: character devices 0:0 and the attribute
	// trusted.overlay.opaque. It is for an image of one layer.
	Overlay bool
	// Scratch is the directory of temporary files, os.TempDir() if it is empty.
	Scratch string
	// MaxBytes bounds the bytes of a layer's plain archive, and those of its sparse files, holes and all; MaxEntries bounds the entries of all layers and the directories that none
	// of them names, together. 0 is no bound.
	MaxBytes, MaxEntries int64
	// MaxMemory bounds the bytes of memory that the tree of files takes. 0 is 1 GiB. A file takes some 256.
	MaxMemory int64
}

const (
	defaultMemory = 1 << 30
	maxLayers     = 1 << 10 // the table of devices precedes the root inode, whose number has 16 bits

	// A sparse file is stored in chunks of so many bytes, and a chunk of zeros not at all.
	sparseBits = 12
	sparseSize = 1 << sparseBits

	bufferSize = 256 << 10
)

// A Builder makes an image of layers.
type Builder struct {
	opts    Options
	tree    *tree
	entries int64
	unset   map[string]int64
	layers  []source
	plain   *os.File // the plain archives of all layers, for a complete image
	chunks  *os.File // of sparse files
	stored  int64    // bytes of them
}

// A source is a layer's plain archive.
type source struct {
	diffID digest.Digest
	size   int64
	offset int64 // in the file of all
}

// NewBuilder returns a Builder of an image that has a root directory only. Close must be called.
func NewBuilder(opts Options) *Builder {
	if opts.MaxMemory == 0 {
		opts.MaxMemory = defaultMemory
	}
	return &Builder{opts: opts, tree: newTree(opts.MaxMemory, opts.Overlay), unset: map[string]int64{}}
}

// Close removes the Builder's temporary files.
func (b *Builder) Close() error {
	var errs []error
	for _, f := range []*os.File{b.plain, b.chunks} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Unset counts what of the layers no image can hold, by kind, as in "ACLs".
func (b *Builder) Unset() map[string]int64 { return b.unset }

// scratch opens a temporary file that has no name.
func (b *Builder) scratch(f **os.File) error {
	if *f != nil {
		return nil
	}
	tmp, err := os.CreateTemp(b.opts.Scratch, "erofs-*")
	if err != nil {
		return err
	}
	*f = tmp
	return os.Remove(tmp.Name())
}

// Add applies a layer, plain or compressed with gzip or zstd, on top of those before, as the image specification's "Applying
// Changesets" says. It fails if the layer does not have the diff ID expect, which may be empty. A directory that no entry names gets
// mode 0755, the owner 0:0 and the time 0.
//
// A layer that is corrupt, ends too early or has another diff ID is ErrDataLoss; one with entries that no layer may have is
// ErrInvalidArgument; one that exceeds a limit is ErrFailedPrecondition; a compression or a whiteout that can't be had is
// ErrNotImplemented. After an error the Builder is good for nothing but Close. Add returns after ctx is done as soon as a read of r
// that is under way returns; to let Add end such a read, r may have SetReadDeadline.
func (b *Builder) Add(ctx context.Context, r io.Reader, expect digest.Digest) error {
	if len(b.layers) == maxLayers {
		return tooMuch("more than %d layers", maxLayers)
	}
	if b.opts.Overlay && len(b.layers) > 0 {
		return refused("the whiteouts of several layers can't be kept")
	}
	src := source{}
	if n := len(b.layers); n > 0 {
		src.offset = b.layers[n-1].offset + b.layers[n-1].size
	}
	var tee io.Writer
	if !b.opts.Index {
		if err := b.scratch(&b.plain); err != nil {
			return err
		}
		tee = b.plain
	}
	in := layer.NewReader(ctx, r, b.opts.MaxBytes, tee)
	defer in.Close()
	b.tree.layer++
	a := &adder{Builder: b, in: in}
	if err := a.run(ctx); err != nil {
		return err
	}
	if err := in.End(expect); err != nil {
		return err
	}
	src.diffID, src.size = in.DiffID(), in.Size()
	b.layers = append(b.layers, src)
	return nil
}

// An adder applies the entries of a layer one by one.
type adder struct {
	*Builder
	in     *layer.Reader
	buffer []byte // of sparse files' content
	sparse int64  // bytes of sparse files, holes and all
}

func (a *adder) run(ctx context.Context) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := a.in.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		a.entries++
		a.tree.linked += linkedDirsPerEntry
		if err := a.entry(h); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
		if n := a.opts.MaxEntries; n > 0 && a.entries+a.tree.made > n {
			return tooMuch("more than %d entries", n)
		}
	}
}

func (a *adder) entry(h *tar.Header) error {
	if len(h.Name) > layer.MaxPath {
		return refused("name of %d bytes", len(h.Name))
	}
	name := layer.Clean(h.Name)
	if strings.HasPrefix(name, layer.MetaPrefix) && name != layer.OpaqueMarker {
		return nil // what aufs kept for itself at the top of a layer
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return nil
		}
		a.tree.touch(a.tree.root)
		return a.attributes(a.tree.root, h)
	}
	parent, base := layer.Split(name)
	if strings.HasPrefix(base, layer.WhiteoutPrefix) {
		return a.whiteout(parent, strings.TrimPrefix(base, layer.WhiteoutPrefix))
	}
	mode := uint16(typeFile)
	switch h.Typeflag {
	case tar.TypeLink:
		return a.link(h, parent, base)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
	case tar.TypeDir:
		mode = typeDir
	case tar.TypeSymlink:
		mode = typeSymlink
		if n := len(h.Linkname); n == 0 || n > maxTarget {
			return refused("symbolic link to a name of %d bytes", n)
		}
	case tar.TypeChar, tar.TypeBlock:
		mode = typeChar
		if h.Typeflag == tar.TypeBlock {
			mode = typeBlock
		}
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return refused("device number %d:%d is out of range", h.Devmajor, h.Devminor)
		}
	case tar.TypeFifo:
		mode = typeFifo
	default:
		return refused("type %q is not supported", h.Typeflag)
	}
	dir, err := a.tree.lookup(parent, false)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
		return a.whiteoutDevice(dir, base)
	}
	n := a.tree.find(dir, base)
	if mode == typeDir && n != nil && n.isDir() {
		a.tree.touch(n)
	} else if n, err = a.tree.create(dir, base, mode); err != nil {
		return err
	}
	if err := a.attributes(n, h); err != nil {
		return err
	}
	switch mode {
	case typeFile:
		return a.content(n, h)
	case typeSymlink:
		n.mode = typeSymlink | 0o777 // symbolic links have no other
		n.more().target = h.Linkname
		return a.tree.charge(len(h.Linkname) + rareMemory)
	case typeChar, typeBlock: // as the kernel's new_encode_dev does
		n.number = uint32(h.Devminor&0xff | h.Devmajor<<8 | (h.Devminor&^0xff)<<12)
	}
	return nil
}

// content notes where a regular file's data are.
func (a *adder) content(n *inode, h *tar.Header) error {
	n.size = h.Size
	if !layer.Sparse(h) {
		n.device, n.offset = a.tree.layer, a.in.Offset()
		return nil
	}
	if h.Size > layer.MaxSparse-a.sparse {
		return refused("sparse files have more than %d bytes together", int64(layer.MaxSparse))
	}
	if a.sparse += h.Size; a.opts.MaxBytes > 0 && a.sparse > a.opts.MaxBytes {
		return tooMuch("sparse files have more than %d bytes together", a.opts.MaxBytes)
	}
	if err := a.scratch(&a.chunks); err != nil {
		return err
	}
	if a.buffer == nil {
		a.buffer = make([]byte, bufferSize)
	}
	var runs []run
	for chunk := uint32(0); ; {
		m, err := io.ReadFull(a.in, a.buffer)
		end := err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !end {
			return err
		}
		clear(a.buffer[m:])
		for c := range slices.Chunk(a.buffer[:align(int64(m), sparseSize)], sparseSize) {
			if !bytes.Equal(c, padding[:sparseSize]) {
				if runs, err = a.store(runs, chunk, c); err != nil {
					return err
				}
			}
			chunk++
		}
		if end {
			n.more().runs = runs
			return nil
		}
	}
}

// store stores a chunk of a sparse file, which becomes part of the last run or a new one.
func (a *adder) store(runs []run, chunk uint32, data []byte) ([]run, error) {
	if _, err := a.chunks.Write(data); err != nil {
		return nil, err
	}
	if n := len(runs); n > 0 && runs[n-1].chunk+runs[n-1].chunks == chunk {
		runs[n-1].chunks++
	} else if err := a.tree.charge(runMemory); err != nil {
		return nil, err
	} else {
		runs = append(runs, run{chunk: chunk, chunks: 1, offset: a.stored})
	}
	a.stored += sparseSize
	return runs, nil
}

func (a *adder) link(h *tar.Header, parent, base string) error {
	target, err := layer.LinkTarget(h)
	if err != nil {
		return err
	}
	t := a.tree
	targetDir, targetBase := layer.Split(target)
	from, err := t.lookup(targetDir, true)
	if err != nil {
		return refused("hard link to %.200q: %w", h.Linkname, err)
	}
	dir, err := t.lookup(parent, false)
	if err != nil {
		return err
	}
	if from == dir && targetBase == base {
		return refused("hard link to itself")
	}
	n := t.find(from, targetBase)
	if n == nil || n.isWhiteout() {
		return refused("hard link to %.200q: %w", h.Linkname, errMissing)
	}
	if n.isDir() {
		return refused("hard link to the directory %.200q", h.Linkname)
	}
	if err := t.check(dir, base); err != nil {
		return err
	}
	for replaced := t.find(dir, base); from != t.root; from = from.dir.parent {
		if from == replaced {
			return refused("hard link to %.200q, which it would replace", h.Linkname)
		}
	}
	return t.put(dir, base, n)
}
