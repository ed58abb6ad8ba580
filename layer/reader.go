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
	blockSize  = 512       // of a tar archive
	chunkSize  = 256 << 10 // a multiple of blockSize, so that no header is split
	chunkCount = 8

	// Holes make a layer no larger, but whoever reads through them spends time. A layer may have holes of maxHoles
	// bytes, and maxHolesPerByte more for each of its bytes.
	maxHoles, maxHolesPerByte = 16 << 30, 1 << 10
)

// Holes bounds the bytes of files that may be read from a layer, including holes.
type Holes struct{ read int64 }

// Add counts n bytes of files. offset is the position in the plain layer. InvalidArgument: more bytes than a layer may
// have by there.
func (h *Holes) Add(n int, offset int64) error {
	h.read += int64(n)
	if h.read/maxHolesPerByte > offset+maxHoles/maxHolesPerByte {
		return refused("files have holes of more than %d bytes and %d for each byte of the layer", int64(maxHoles), maxHolesPerByte)
	}
	return nil
}

// A Reader yields the entries of a layer in order. The layer is a tar archive, plain or compressed with gzip or zstd.
//
// ErrDataLoss: the archive or the compressed data is corrupt or ends too early. ErrNotImplemented: the compression is
// not supported. Errors of the underlying reader keep their class.
type Reader struct {
	r      io.Reader
	cancel context.CancelFunc

	in    *stream
	tar   *tar.Reader
	tap   Tap // may be nil
	holes Holes
	rest  [32 << 10]byte
}

// NewReader starts to read r. Goroutines decompress and hash ahead, so the caller must call Close. If the layer has
// more than most plain bytes, reading fails with ErrFailedPrecondition; a most of 0 means no bound. If tee is not nil,
// the plain bytes are written to it too: all of them have been once End has returned.
func NewReader(ctx context.Context, r io.Reader, most int64, tee io.Writer) *Reader {
	return NewReaderInTurn(ctx, r, most, tee, nil)
}

// A Turn waits for permission to use memory for a zstd window larger than [compression.LargeWindow]. The caller calls
// over when that memory is free again.
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

// A Tap observes the structure of a layer while it is read.
type Tap interface {
	compression.Points
	// Write gets the plain bytes. Write and the methods of Points are called from other goroutines than the Reader's
	// caller.
	io.Writer
	// Header gets the parts of the archive that are not data of files, in order, each with its offset. A call has bytes
	// of one entry only, as Next reads them.
	Header(offset int64, b []byte)
}

// NewIndexer is NewReader with a Tap.
func NewIndexer(ctx context.Context, r io.Reader, tap Tap) *Reader {
	return newReader(ctx, r, 0, tap, nil, tap)
}

// Close stops reading, and returns after the underlying reader is no longer used. It waits for a read in progress. If
// the reader has SetReadDeadline, Close uses it to end that read.
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

// Next returns the next entry, or io.EOF at the end of the archive. Global headers are skipped.
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

// discard skips the rest of the entry's content, so that the next header follows.
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

// Read reads the content of the entry that Next returned last. Holes of a sparse file are read as zeros.
func (r *Reader) Read(p []byte) (int, error) {
	n, err := r.tar.Read(p)
	if err := r.holes.Add(n, r.in.offset); err != nil {
		return 0, err
	}
	return n, r.classify(err)
}

// classify gives a class to an error of package tar.
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

// End reads to the end of the stream, after Next has returned io.EOF. It fails if expect is not empty and the layer has
// another diff ID. If expect is empty, the archive must have an end-of-archive marker: otherwise it may have been cut
// short.
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

// Offset returns the number of plain bytes read so far. After Next it is the offset of the entry's content.
func (r *Reader) Offset() int64 { return r.in.offset }

// DiffID returns the digest of the plain archive. It may be called only after End.
func (r *Reader) DiffID() digest.Digest {
	<-r.in.done
	return digest.NewDigest(digest.SHA256, r.in.digest)
}

// Size returns the size of the plain archive. It may be called only after End.
func (r *Reader) Size() int64 {
	<-r.in.done
	return r.in.size
}

// decompress returns a reader of the plain bytes of r, and a function that frees the decompressor. large and points are
// as in [compression.NewIndexer].
func decompress(r *bufio.Reader, large func() error, points compression.Points) (io.Reader, func(), error) {
	plain, release, err := compression.NewIndexer(r, large, points)
	if err == io.EOF { // an empty layer is valid if its diff ID is expected
		return r, func() {}, nil
	}
	return plain, release, err
}

// A stream decompresses and hashes ahead of its reader. One goroutine decompresses into chunks, another one hashes
// them, and Read returns them in order.
type stream struct {
	ctx    context.Context
	most   int64 // limit on the plain bytes, 0 for none
	hashed chan chunk
	free   chan []byte
	done   chan struct{} // closed when both goroutines have ended

	whole, rest []byte // the current chunk, and its unread part
	err         error
	offset      int64 // bytes read
	tap         Tap   // may be nil

	// marked is true if the block at offset watch, where the next header is due, was all zeros: an end-of-archive
	// marker.
	watch  int64
	marked bool

	digest hash.Hash // complete once err is io.EOF
	size   int64
}

type chunk struct {
	data []byte
	err  error // ends the stream; comes after data
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
		defer func() { over() }() // runs last: the decompressor has been closed by then
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

// inputError classes an error of the decompressor as corrupt data, unless it is an error of reading the input.
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
		s.hashed <- c // never blocks: the channel has room for all chunks and one error
	}
}

var zeros [blockSize]byte

// next ensures that rest has unread bytes.
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

// drain reads to the end, so that digest and size cover the whole stream.
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
