package archive

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"

	"github.com/containerd/errdefs"

	"distkit/compression"
)

const (
	blockSize  = 512       // of tar
	chunkSize  = 256 << 10 // of whole blocks: a header is never parted
	chunkCount = 8
)

// decompress returns the plain bytes of r, and a function that releases what the decompressor holds.
func decompress(r *bufio.Reader) (io.Reader, func(), error) {
	plain, release, err := compression.NewReader(r)
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

// input remembers the error of the reader it wraps, to tell it from those of a decompressor.
type input struct {
	r   io.Reader
	err error
}

func (i *input) Read(p []byte) (int, error) {
	n, err := i.r.Read(p)
	if err != nil && err != io.EOF {
		i.err = err
	}
	return n, err
}

// newStream starts to read r. Both goroutines end once ctx is done and the read of r that is
// under way has returned.
func newStream(ctx context.Context, r io.Reader, most int64) *stream {
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
	go s.produce(r, raw)
	go s.hash(raw)
	return s
}

func (s *stream) produce(r io.Reader, raw chan<- chunk) {
	defer close(raw)
	in := &input{r: r}
	plain, release, err := decompress(bufio.NewReaderSize(in, chunkSize))
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
func inputError(in *input, err error) error {
	switch {
	case in.err != nil:
		return in.err
	case errdefs.IsNotImplemented(err), errdefs.IsDataLoss(err):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return dataLoss("compressed data ends too early")
	}
	return dataLoss("decompress: %w", err)
}

func (s *stream) hash(raw <-chan chunk) {
	defer close(s.done)
	defer close(s.hashed)
	for c := range raw {
		s.digest.Write(c.data)
		s.size += int64(len(c.data))
		s.hashed <- c // never blocks: there are as many places as chunks, and one error
	}
}

var zeros [4096]byte

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
		s.marked = bytes.Equal(p[:n], zeros[:blockSize])
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
