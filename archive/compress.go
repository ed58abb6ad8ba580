package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"hash/crc32"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// Compression is the compression of a layer that is written.
type Compression int

const (
	Gzip Compression = iota
	Zstd
	Uncompressed
)

// A Layer is the descriptor of a layer that was written, and its diff ID: the digest of its uncompressed archive.
type Layer struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
	DiffID    digest.Digest `json:"diffID"`
}

const (
	// pieceSize is how much is compressed at a time. A layer's bytes depend on it, so it must not depend on the number
	// of goroutines.
	pieceSize  = 512 << 10
	dictSize   = 32 << 10 // DEFLATE's window
	zstdWindow = 1 << 20  // each goroutine of the encoder takes more than four times as much memory
	gzipLevel  = 5
)

var gzipHeader = []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff} // no name, time or operating system

// A compressor compresses the archive that is written to it. Pieces of a gzip layer are deflated concurrently, each
// with the end of the piece before it as its dictionary, and form a single gzip member. One goroutine hashes and writes
// the pieces in order.
type compressor struct {
	ctx    context.Context
	form   Compression
	out    counted
	zstd   *zstd.Encoder
	piece  *piece
	dict   []byte
	spare  chan *piece
	work   chan *piece
	order  chan *piece
	failed chan struct{} // closed after err is set
	err    error
	ended  sync.WaitGroup

	plain hash.Hash
	crc   uint32
	size  uint32 // modulo 2^32, as in the trailer of gzip
}

// A piece is a part of the archive.
type piece struct {
	data, dict []byte
	deflated   bytes.Buffer
	last       bool
	ready      chan struct{} // closed when the worker is done
}

// counted counts and hashes what is written through it.
type counted struct {
	w      io.Writer
	digest hash.Hash
	size   int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.digest.Write(p[:n])
	c.size += int64(n)
	return n, err
}

// newCompressor starts a layer. The caller must call finish or abandon.
func newCompressor(ctx context.Context, w io.Writer, form Compression, workers int) (*compressor, error) {
	c := &compressor{
		ctx: ctx, form: form,
		out:    counted{w: w, digest: sha256.New()},
		plain:  sha256.New(),
		spare:  make(chan *piece, 2*workers+1),
		work:   make(chan *piece, 2*workers+1),
		order:  make(chan *piece, 2*workers+1),
		failed: make(chan struct{}),
	}
	for range cap(c.spare) {
		c.spare <- &piece{}
	}
	switch form {
	case Gzip:
		for range workers {
			c.ended.Go(c.deflate)
		}
	case Zstd:
		var err error
		// With one goroutine the encoder would split its input differently than with two or more.
		c.zstd, err = zstd.NewWriter(&c.out, zstd.WithWindowSize(zstdWindow),
			zstd.WithConcurrentBlocks(true), zstd.WithEncoderConcurrency(max(2, workers)))
		if err != nil {
			return nil, err
		}
	case Uncompressed:
	default:
		return nil, invalid("compression %d is not known", form)
	}
	c.ended.Go(c.write)
	return c, nil
}

func (c *compressor) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		if err := c.room(); err != nil {
			return n, err
		}
		f := c.piece
		m := copy(f.data[len(f.data):pieceSize], p[n:])
		f.data = f.data[:len(f.data)+m]
		n += m
		if len(f.data) == pieceSize {
			c.send()
		}
	}
	return n, nil
}

// room makes sure that c.piece has space for data.
func (c *compressor) room() error {
	if c.piece != nil {
		return nil
	}
	select {
	case c.piece = <-c.spare:
	case <-c.failed:
		return c.err
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	f := c.piece
	if f.data == nil {
		f.data = make([]byte, 0, pieceSize)
	}
	f.data, f.ready = f.data[:0], make(chan struct{})
	return nil
}

func (c *compressor) send() {
	f := c.piece
	c.piece = nil
	if c.form == Gzip {
		f.dict = append(f.dict[:0], c.dict...)
		c.dict = append(c.dict[:0], f.data[max(0, len(f.data)-dictSize):]...)
		c.work <- f // never blocks: the channel has space for all pieces
	}
	c.order <- f
}

// deflate is the loop of a worker that compresses pieces.
func (c *compressor) deflate() {
	var w *flate.Writer
	for p := range c.work {
		p.deflated.Reset()
		if w == nil {
			w, _ = flate.NewWriter(&p.deflated, gzipLevel) // only an invalid level is an error
		}
		w.ResetDict(&p.deflated, p.dict)
		_, _ = w.Write(p.data) // to memory: no error
		if p.last {
			_ = w.Close()
		} else {
			_ = w.Flush()
		}
		close(p.ready)
	}
}

// write writes the pieces in order.
func (c *compressor) write() {
	fail := func(err error) {
		if c.err == nil && err != nil {
			c.err = err
			close(c.failed)
		}
	}
	if c.form == Gzip {
		_, err := c.out.Write(gzipHeader)
		fail(err)
	}
	for p := range c.order {
		var err error
		c.plain.Write(p.data)
		switch c.form {
		case Gzip:
			c.crc = crc32.Update(c.crc, crc32.IEEETable, p.data)
			c.size += uint32(len(p.data))
			<-p.ready
			if c.err == nil {
				_, err = c.out.Write(p.deflated.Bytes())
			}
		case Zstd:
			if c.err == nil {
				_, err = c.zstd.Write(p.data)
			}
		case Uncompressed:
			if c.err == nil {
				_, err = c.out.Write(p.data)
			}
		}
		fail(err)
		c.spare <- p
	}
}

// finish ends the layer and returns its descriptor.
func (c *compressor) finish() (Layer, error) {
	if err := c.room(); err != nil {
		c.abandon()
		return Layer{}, err
	}
	c.piece.last = true
	c.send()
	c.close()
	err := c.err
	switch {
	case err != nil:
		if c.zstd != nil {
			_ = c.zstd.Close()
		}
	case c.form == Gzip:
		_, err = c.out.Write(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, c.crc), c.size))
	case c.form == Zstd:
		err = c.zstd.Close()
	}
	if err != nil {
		return Layer{}, err
	}
	return Layer{
		MediaType: mediaTypes[c.form],
		Digest:    digest.NewDigest(digest.SHA256, c.out.digest),
		Size:      c.out.size,
		DiffID:    digest.NewDigest(digest.SHA256, c.plain),
	}, nil
}

var mediaTypes = [...]string{
	Gzip:         "application/vnd.oci.image.layer.v1.tar+gzip",
	Zstd:         "application/vnd.oci.image.layer.v1.tar+zstd",
	Uncompressed: "application/vnd.oci.image.layer.v1.tar",
}

// abandon ends the goroutines, as soon as the current write returns.
func (c *compressor) abandon() {
	c.close()
	if c.zstd != nil {
		c.zstd.Reset(io.Discard)
		_ = c.zstd.Close()
	}
}

func (c *compressor) close() {
	close(c.work)
	close(c.order)
	c.ended.Wait()
}

// ParseCompression parses gzip, zstd or none.
func ParseCompression(name string) (Compression, error) {
	for form, n := range []string{Gzip: "gzip", Zstd: "zstd", Uncompressed: "none"} {
		if n == name {
			return Compression(form), nil
		}
	}
	return 0, invalid("compression %q is not one of gzip, zstd, none", name)
}
