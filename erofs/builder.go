package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"distkit/errclass"
	"distkit/layer"
	"distkit/layer/tree"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Options change what a Builder does. The zero value makes a complete image.
type Options struct {
	// Index makes an image of metadata only. The data of files stay in the layers' plain archives, which the image
	// refers to.
	Index bool
	// Overlay keeps whiteouts in the form that overlayfs reads in a lower directory: character devices 0:0 and the attribute
	// trusted.overlay.opaque. It is for an image of one layer.
	Overlay bool
	// Scratch is the directory of temporary files, os.TempDir() if it is empty.
	Scratch string
	// Strict makes Write, WriteExt4 and WriteTar fail if something must be left out: see [Builder.Unset].
	Strict bool
	// MaxBytes bounds the bytes of a layer's plain archive, and those of its sparse files including holes. MaxEntries
	// bounds the entries of all layers together, including directories that no entry names. 0 means no bound.
	MaxBytes, MaxEntries int64
	// MaxMemory bounds the memory of the tree of files, in bytes. 0 means 1 GiB. A file takes about 130 bytes.
	MaxMemory int64
}

const (
	defaultMemory = 1 << 30
	// MaxLayers is the largest number of layers in an image.
	MaxLayers = 1 << 10 // the table of devices precedes the root inode, whose number has 16 bits

	// Sparse files are stored in chunks of this size. Chunks of zeros are not stored.
	sparseBits = 12
	sparseSize = 1 << sparseBits

	bufferSize = 256 << 10
)

// A Builder applies layers to a tree in memory, and writes the tree as a file system.
type Builder struct {
	opts   Options
	tree   *tree.Tree[inode]
	unset  map[string]int64
	layers []source
	plain  *os.File // for a complete image: the plain archives of all layers, one after the other
	chunks *os.File // scratch file: the chunks of sparse files
	stored int64    // bytes in chunks
}

// A source is a layer's plain archive.
type source struct {
	diffID digest.Digest
	size   int64
	offset int64 // in the Builder's file of plain archives
}

// NewBuilder returns a Builder whose tree has only a root directory. The caller must call Close.
func NewBuilder(opts Options) *Builder {
	if opts.MaxMemory == 0 {
		opts.MaxMemory = defaultMemory
	}
	return &Builder{opts: opts, tree: newTree(opts), unset: map[string]int64{}}
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

// Unset counts by kind, as in "ACLs", what the layers have and the image can't hold.
func (b *Builder) Unset() map[string]int64 { return b.unset }

// UUID derives an identifier from the layers' diff IDs and the name of a format.
func (b *Builder) UUID(format string) (id [16]byte) {
	hash := sha256.New()
	fmt.Fprintln(hash, format)
	for _, l := range b.layers {
		fmt.Fprintln(hash, l.diffID)
	}
	copy(id[:], hash.Sum(nil))
	return id
}

// strict returns an error if Options.Strict is set and something was left out.
func (b *Builder) strict() error {
	if !b.opts.Strict || len(b.unset) == 0 {
		return nil
	}
	return errclass.Errorf(errdefs.ErrNotImplemented, "the file system can't hold %s of the image", strings.Join(slices.Sorted(maps.Keys(b.unset)), ", "))
}

// scratch opens an unlinked temporary file, unless *f is open already.
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

// Add applies a layer on top of the previous ones, as the image specification's "Applying Changesets" says. The layer
// is plain or compressed with gzip or zstd. If expect is not empty, the layer must have that diff ID. A directory that
// no entry names gets mode 0755, owner 0:0 and time 0.
//
// ErrDataLoss: the layer is corrupt, ends too early or has another diff ID. ErrInvalidArgument: an entry is invalid in
// any layer. ErrFailedPrecondition: a limit is exceeded. ErrNotImplemented: a compression or a whiteout that is not
// supported. After an error only Close may be called.
//
// Once ctx is done, Add returns after the current read of r. If r has SetReadDeadline, Add uses it to end that read.
func (b *Builder) Add(ctx context.Context, r io.Reader, expect digest.Digest) error {
	var tee io.Writer
	if !b.opts.Index {
		if err := b.scratch(&b.plain); err != nil {
			return err
		}
		tee = b.plain
	}
	in := layer.NewReader(ctx, r, b.opts.MaxBytes, tee)
	defer in.Close()
	if err := b.apply(ctx, in); err != nil {
		return err
	}
	if err := in.End(expect); err != nil {
		return err
	}
	b.added(in.DiffID(), in.Size())
	return nil
}

// AddVerified adds a layer to an index as Add does, from its plain archive of size bytes. The caller must have verified
// the archive's diff ID: AddVerified does not read the contents of its files.
func (b *Builder) AddVerified(ctx context.Context, r io.ReaderAt, size int64, diffID digest.Digest) error {
	if err := b.apply(ctx, layer.NewPlain(ctx, r)); err != nil {
		return err
	}
	b.added(diffID, size)
	return nil
}

func (b *Builder) apply(ctx context.Context, in entries) error {
	if len(b.layers) == MaxLayers {
		return tooMuch("more than %d layers", MaxLayers)
	}
	if b.opts.Overlay && len(b.layers) > 0 {
		return refused("the whiteouts of several layers can't be kept")
	}
	b.tree.NextLayer()
	a := &adder{Builder: b, in: in}
	return a.run(ctx)
}

func (b *Builder) added(diffID digest.Digest, size int64) {
	src := source{diffID: diffID, size: size}
	if n := len(b.layers); n > 0 {
		src.offset = b.layers[n-1].offset + b.layers[n-1].size
	}
	b.layers = append(b.layers, src)
}

// entries yields the entries of a layer; [layer.Reader] and [layer.Plain] implement it.
type entries interface {
	io.Reader
	Next() (*tar.Header, error)
	Offset() int64
}

// sparseFiles is the number of bytes of a layer's sparse files, including holes.
type sparseFiles int64

// add counts h if it is a sparse file. FailedPrecondition: the sparse files have more than most bytes together. A most
// of 0 means no bound.
func (s *sparseFiles) add(h *tar.Header, most int64) error {
	if !layer.Sparse(h) {
		return nil
	}
	if h.Size > layer.MaxSparse-int64(*s) {
		return refused("sparse files have more than %d bytes together", int64(layer.MaxSparse))
	}
	if *s += sparseFiles(h.Size); most > 0 && int64(*s) > most {
		return tooMuch("sparse files have more than %d bytes together", most)
	}
	return nil
}

// An adder applies the entries of a layer one by one.
type adder struct {
	*Builder
	in     entries
	buffer []byte // for the content of sparse files
	sparse sparseFiles
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
		if err := a.entry(h); err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
		if n := a.opts.MaxEntries; n > 0 && a.tree.Entries() > n {
			return tooMuch("more than %d entries", n)
		}
	}
}

func (a *adder) entry(h *tar.Header) error {
	c, err := a.tree.Apply(h)
	if err != nil {
		return err
	}
	switch c.Action {
	case tree.Dropped:
		a.unset["devices"]++
		return nil
	case tree.Made, tree.Merged:
	default:
		return nil
	}
	n := a.tree.File(c.Entry)
	if err := a.attributes(n, h); err != nil {
		return err
	}
	switch a.tree.Kind(c.Entry) {
	case tree.Regular:
		return a.content(n, h)
	case tree.Symlink:
		n.mode = typeSymlink | 0o777 // Linux ignores the mode of symbolic links, and reports this one
	case tree.Char, tree.Block: // encoded like the kernel's new_encode_dev
		n.number = uint32(h.Devminor&0xff | h.Devmajor<<8 | (h.Devminor&^0xff)<<12)
	}
	return nil
}

// content records where the data of a regular file are.
func (a *adder) content(n *inode, h *tar.Header) error {
	n.size = h.Size
	if !layer.Sparse(h) {
		n.device, n.offset = uint16(len(a.layers)+1), a.in.Offset()
		return nil
	}
	if err := a.sparse.add(h, a.opts.MaxBytes); err != nil {
		return err
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

// store stores a chunk of a sparse file. It extends the last run or begins a new one.
func (a *adder) store(runs []run, chunk uint32, data []byte) ([]run, error) {
	if _, err := a.chunks.Write(data); err != nil {
		return nil, err
	}
	if n := len(runs); n > 0 && runs[n-1].chunk+runs[n-1].chunks == chunk {
		runs[n-1].chunks++
	} else if err := a.tree.Charge(runMemory); err != nil {
		return nil, err
	} else {
		runs = append(runs, run{chunk: chunk, chunks: 1, offset: a.stored})
	}
	a.stored += sparseSize
	return runs, nil
}
