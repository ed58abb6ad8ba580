package layer

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"distkit/compression"
)

const (
	blockSize  = 512       // of tar
	chunkSize  = 256 << 10 // of whole blocks: a header is never parted
	chunkCount = 8

	// Holes of sparse files cost a layer nothing, but whoever reads through them time. So many bytes of files are given, and so many
	// more for each byte of the layer.
	maxHoles, maxHolesPerByte = 16 << 30, 1 << 10
)

// Holes bounds how long the holes are that are read of a layer's files.
type Holes struct{ read int64 }

// Add counts bytes of files that were read, up to an offset of the plain layer. InvalidArgument: there are too many.
func (h *Holes) Add(n int, offset int64) error {
	h.read += int64(n)
	if h.read/maxHolesPerByte > offset+maxHoles/maxHolesPerByte {
		return refused("files have holes of more than %d bytes and %d for each byte of the layer", int64(maxHoles), maxHolesPerByte)
	}
	return nil
}

// A Reader gives the entries of a layer in order: a tar archive, plain or compressed with gzip or zstd.
//
// What is wrong with the layer is ErrDataLoss: an archive or compressed data that is corrupt or ends too early. A compression that
// is not supported is ErrNotImplemented. Errors of the reader below keep their class.
type Reader struct {
	r      io.Reader
	cancel context.CancelFunc

	in    *stream
	tar   *tar.Reader
	tap   Tap // or nil
	holes Holes
	rest  [32 << 10]byte
}

// NewReader starts to read r in goroutines of its own: they decompress and hash ahead. Close must be called. A layer of more than most plain bytes is ErrFailedPrecondition, unless most is 0. The plain bytes are
// written to tee too, unless it is nil: all of them once End has returned.
func NewReader(ctx context.Context, r io.Reader, most int64, tee io.Writer) *Reader {
	return NewReaderInTurn(ctx, r, most, tee, nil)
}

// A Turn waits until memory may be taken for a zstd window of more than [compression.LargeWindow]. What it returns is called once the
// window is given back.
type Turn func(context.Context) (over func(), err error)

// NewReaderInTurn is NewReader for one of many layers that are read at the same time. turn may be nil.
func NewReaderInTurn(ctx context.Context, r io.Reader, most int64, tee io.Writer, turn Turn) *Reader {
	return newReader(ctx, r, most, tee, turn, nil)
}

func newReader(ctx context.Context, r io.Reader, most int64, tee io.Writer, turn Turn, tap Tap) *Reader {
	ctx, cancel := context.WithCancel(ctx)
	in := newStream(ctx, r, most, tee, turn, tap)
	return &Reader{r: r, cancel: cancel, in: in, tar: tar.NewReader(in), tap: tap}
}

// A Tap is told how a layer is made while it is read.
type Tap interface {
	compression.Points
	// Write is given the plain bytes. It and the methods of Points run in other goroutines than the reader's.
	io.Writer
	// Header is given what is read at an offset of the archive beside the data of files, in order, and nothing more of one entry than what
	// Next reads.
	Header(offset int64, b []byte)
}

// NewIndexer is NewReader with a tap.
func NewIndexer(ctx context.Context, r io.Reader, tap Tap) *Reader {
	return newReader(ctx, r, 0, tap, nil, tap)
}

// Close returns once the layer is not read any more. It waits for a read that is under way: to let Close end that, the reader may have
// SetReadDeadline.
func (r *Reader) Close() {
	r.cancel()
	select {
	case <-r.in.done:
		return
	default:
	}
	if d, ok := r.r.(interface{ SetReadDeadline(time.Time) error }); ok {
		_ = d.SetReadDeadline(time.Now())
	}
	<-r.in.done
}

// Next returns the next entry that is not a global header, or io.EOF where the archive ends.
func (r *Reader) Next() (*tar.Header, error) {
	for {
		if err := r.discard(); err != nil {
			return nil, err
		}
		r.in.watch = (r.in.offset + blockSize - 1) / blockSize * blockSize
		r.in.tap = r.tap
		h, err := r.tar.Next()
		r.in.tap = nil
		if err != nil {
			return nil, r.classify(err)
		}
		if h.Typeflag != tar.TypeXGlobalHeader {
			return h, nil
		}
	}
}

// discard reads what is left of an entry, so that the stream is where the next header is due.
func (r *Reader) discard() error {
	for {
		if err := r.in.ctx.Err(); err != nil {
			return err
		}
		if _, err := r.Read(r.rest[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// Read reads the content of the entry that Next returned last. The holes of a sparse file read as zeros.
func (r *Reader) Read(p []byte) (int, error) {
	n, err := r.tar.Read(p)
	if err := r.holes.Add(n, r.in.offset); err != nil {
		return 0, err
	}
	return n, r.classify(err)
}

// classify gives an error of the archive's reader its class.
func (r *Reader) classify(err error) error {
	switch {
	case err == nil, err == io.EOF:
		return err
	case r.in.err != nil && r.in.err != io.EOF:
		return r.in.err
	case errors.Is(err, io.ErrUnexpectedEOF):
		if r.in.offset >= blockSize {
			return dataLoss("layer ends too early, after %d bytes", r.in.offset)
		}
		fallthrough
	case errors.Is(err, tar.ErrHeader) && r.in.offset <= blockSize:
		return dataLoss("not a layer: neither a tar archive nor one compressed with gzip or zstd")
	}
	return dataLoss("read layer, at the entry at byte %d: %w", r.in.watch, err)
}

// End reads to the end of the stream, once Next has returned io.EOF. It fails if the layer does not have the diff ID expect. Where
// none is expected, a layer without an end-of-archive marker is taken for one that was cut short.
func (r *Reader) End(expect digest.Digest) error {
	if err := r.in.drain(); err != nil {
		return err
	}
	switch {
	case expect != "":
		if got := r.DiffID(); got != expect {
			return dataLoss("diff ID mismatch: got %s, expected %s", got, expect)
		}
	case r.in.offset == 0:
		return dataLoss("layer is empty")
	case !r.in.marked:
		return dataLoss("layer ends without the end-of-archive marker, after %d bytes", r.in.offset)
	}
	return nil
}

// Offset returns the number of plain bytes read so far: after Next, where the entry's content begins.
func (r *Reader) Offset() int64 { return r.in.offset }

// DiffID returns the digest of the plain archive, and is only for after End.
func (r *Reader) DiffID() digest.Digest {
	<-r.in.done
	return digest.NewDigest(digest.SHA256, r.in.digest)
}

// Size returns the number of bytes of the plain archive, and is only for after End.
func (r *Reader) Size() int64 {
	<-r.in.done
	return r.in.size
}

// decompress returns the plain bytes of r, and a function that releases what the decompressor holds. large and points are as in
// [compression.NewIndexer].
func decompress(r *bufio.Reader, large func() error, points compression.Points) (io.Reader, func(), error) {
	plain, release, err := compression.NewIndexer(r, large, points)
	if err == io.EOF { // an empty layer is known by its diff ID
		return r, func() {}, nil
	}
	return plain, release, err
}

// A stream reads, decompresses and hashes ahead of its reader: one goroutine decompresses
// into chunks, a second one hashes them, the reader gets them in order.
type stream struct {
	ctx    context.Context
	most   int64 // bytes that may be read, 0 for any number
	hashed chan chunk
	free   chan []byte
	done   chan struct{} // closed when both goroutines have ended

	whole, rest []byte // the chunk that is being read, and what is left of it
	err         error
	offset      int64 // bytes read
	tap         Tap   // is told what is read, unless it is nil

	// marked is set when the block at offset watch, where the next header is due, was all zeros: an end-of-archive marker.
	watch  int64
	marked bool

	digest hash.Hash // complete once err is io.EOF
	size   int64
}

type chunk struct {
	data []byte
	err  error // ends the stream, after data
}

func newStream(ctx context.Context, r io.Reader, most int64, tee io.Writer, turn Turn, tap Tap) *stream {
	s := &stream{
		ctx:    ctx,
		most:   most,
		hashed: make(chan chunk, chunkCount+1),
		free:   make(chan []byte, chunkCount),
		done:   make(chan struct{}),
		digest: sha256.New(),
	}
	for range chunkCount {
		s.free <- make([]byte, chunkSize)
	}
	raw := make(chan chunk, chunkCount+1)
	var points compression.Points
	if tap != nil {
		points = tap
	}
	go s.produce(r, raw, turn, points)
	go s.hash(raw, tee)
	return s
}

func (s *stream) produce(r io.Reader, raw chan<- chunk, turn Turn, points compression.Points) {
	defer close(raw)
	in := &compression.Input{Reader: r}
	var large func() error
	if turn != nil {
		over := func() {}
		defer func() { over() }() // after the decompressor is closed
		large = func() error {
			done, err := turn(s.ctx)
			if err != nil {
				in.Err = err
				return err
			}
			over = done
			return nil
		}
	}
	plain, release, err := decompress(bufio.NewReaderSize(in, chunkSize), large, points)
	if err == nil {
		defer release()
	}
	for err == nil {
		var buf []byte
		select {
		case buf = <-s.free:
		case <-s.ctx.Done():
			return
		}
		n := 0
		for n < len(buf) && err == nil {
			var m int
			m, err = plain.Read(buf[n:])
			n += m
		}
		if err == nil || n > 0 {
			raw <- chunk{data: buf[:n]}
		}
	}
	if err != io.EOF {
		err = inputError(in, err)
	}
	raw <- chunk{err: err}
}

// inputError gives what a decompressor found wrong the class of corrupt data, and leaves
// errors of reading alone.
func inputError(in *compression.Input, err error) error {
	switch {
	case in.Err != nil:
		return in.Err
	case errdefs.IsNotImplemented(err), errdefs.IsDataLoss(err):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return dataLoss("compressed data ends too early")
	}
	return dataLoss("decompress: %w", err)
}

func (s *stream) hash(raw <-chan chunk, tee io.Writer) {
	defer close(s.done)
	defer close(s.hashed)
	for c := range raw {
		s.digest.Write(c.data)
		s.size += int64(len(c.data))
		if tee != nil && c.err == nil {
			_, c.err = tee.Write(c.data)
		}
		s.hashed <- c // never blocks: there are as many places as chunks, and one error
	}
}

var zeros [blockSize]byte

// next makes rest hold bytes that were not read yet.
func (s *stream) next() error {
	for len(s.rest) == 0 {
		if s.err != nil {
			return s.err
		}
		if s.whole != nil {
			s.free <- s.whole[:chunkSize]
			s.whole = nil
		}
		select {
		case c, ok := <-s.hashed:
			switch {
			case !ok:
				s.err = s.ctx.Err()
			case c.err != nil:
				s.err = c.err
			default:
				s.whole, s.rest = c.data, c.data
				if s.most > 0 && s.offset+int64(len(c.data)) > s.most {
					s.rest, s.err = nil, tooMuch("layer has more than %d bytes", s.most)
					return s.err
				}
			}
		case <-s.ctx.Done():
			s.err = s.ctx.Err()
		}
	}
	return nil
}

func (s *stream) Read(p []byte) (int, error) {
	if err := s.next(); err != nil {
		return 0, err
	}
	n := copy(p, s.rest)
	if s.offset == s.watch && n == blockSize {
		s.marked = bytes.Equal(p[:n], zeros[:])
	}
	if s.tap != nil {
		s.tap.Header(s.offset, p[:n])
	}
	s.rest = s.rest[n:]
	s.offset += int64(n)
	return n, nil
}

// drain reads to the end, so that digest and size are those of the whole stream.
func (s *stream) drain() error {
	for {
		s.offset += int64(len(s.rest))
		s.rest = nil
		if err := s.next(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}
