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

// Compression is the form in which a layer is written.
type Compression int

const (
	Gzip Compression = iota
	Zstd
	Uncompressed
)

// A Layer is the descriptor of a layer that was written, with the digest of its plain archive.
type Layer struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
	DiffID    digest.Digest `json:"diffID"`
}

const (
	// What is compressed at a time. It is part of what the bytes of a layer depend on, as the
	// number of goroutines must not be.
	pieceSize  = 512 << 10
	dictSize   = 32 << 10 // deflate's window
	zstdWindow = 1 << 20  // the encoder holds four times as much for each goroutine, and more
	gzipLevel  = 5
)

var gzipHeader = []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff} // no name, no time, no system

// A compressor writes a layer from the archive written to it. Pieces of a gzip layer are
// deflated side by side, each with the end of the one before as its dictionary, and make one
// member; one goroutine hashes and writes them in order.
type compressor struct {
	ctx    context.Context
	form   Compression
	out    counted
	zstd   *zstd.Encoder
	fill   *piece
	dict   []byte
	spare  chan *piece
	work   chan *piece
	order  chan *piece
	failed chan struct{} // closed after err is set
	err    error
	ended  sync.WaitGroup

	plain hash.Hash
	crc   uint32
	size  uint32 // modulo 2^32, as gzip has it
}

// A piece is a part of the archive.
type piece struct {
	data, dict []byte
	deflated   bytes.Buffer
	last       bool
	ready      chan struct{} // the worker is done
}

// counted hashes and counts what goes through it.
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

// newCompressor starts a layer. Either finish or abandon must be called.
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
		// Two make the encoder split its input as any larger number does.
		c.zstd, err = zstd.NewWriter(&c.out, zstd.WithWindowSize(zstdWindow),
			zstd.WithConcurrentBlocks(true), zstd.WithEncoderConcurrency(max(2, workers)))
		if err != nil {
			return nil, err
		}
	case Uncompressed:
	default:
		return nil, refused("compression %d is not known", form)
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
		f := c.fill
		m := copy(f.data[len(f.data):pieceSize], p[n:])
		f.data = f.data[:len(f.data)+m]
		n += m
		if len(f.data) == pieceSize {
			c.send()
		}
	}
	return n, nil
}

// room makes fill a piece that takes data.
func (c *compressor) room() error {
	if c.fill != nil {
		return nil
	}
	select {
	case c.fill = <-c.spare:
	case <-c.failed:
		return c.err
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	f := c.fill
	if f.data == nil {
		f.data = make([]byte, 0, pieceSize)
	}
	f.data, f.ready = f.data[:0], make(chan struct{})
	return nil
}

func (c *compressor) send() {
	f := c.fill
	c.fill = nil
	if c.form == Gzip {
		f.dict = append(f.dict[:0], c.dict...)
		c.dict = append(c.dict[:0], f.data[max(0, len(f.data)-dictSize):]...)
		c.work <- f // never blocks: there are as many places as pieces
	}
	c.order <- f
}

// deflate is a worker.
func (c *compressor) deflate() {
	var w *flate.Writer
	for p := range c.work {
		p.deflated.Reset()
		if w == nil {
			w, _ = flate.NewWriter(&p.deflated, gzipLevel) // fails for levels that are none
		}
		w.ResetDict(&p.deflated, p.dict)
		_, _ = w.Write(p.data) // into memory
		if p.last {
			_ = w.Close()
		} else {
			_ = w.Flush()
		}
		close(p.ready)
	}
}

// write takes the pieces in order.
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

// finish ends the layer and tells what it is.
func (c *compressor) finish() (Layer, error) {
	if err := c.room(); err != nil {
		c.abandon()
		return Layer{}, err
	}
	c.fill.last = true
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

// abandon ends the goroutines once the write that is under way has returned.
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

// ParseCompression takes gzip, zstd or none.
func ParseCompression(name string) (Compression, error) {
	for form, n := range []string{Gzip: "gzip", Zstd: "zstd", Uncompressed: "none"} {
		if n == name {
			return Compression(form), nil
		}
	}
	return 0, refused("compression %q is not one of gzip, zstd, none", name)
}
