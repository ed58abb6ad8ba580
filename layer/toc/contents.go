package toc

import (
	"bufio"
	"context"
	"errors"
	"io"

	"distkit/compression"

	"github.com/opencontainers/go-digest"
)

const (
	gap = 512 << 10 // bytes that are read and not used to spare a request

	// leastNeed is more than the bytes by which compressed data may be longer than plain data, in files that are usual.
	leastNeed = 64 << 10

	// Of several files more is asked for at once than one needs: the next ones most likely follow it.
	leastAhead, mostAhead = 256 << 10, 8 << 20
)

// Contents reads the contents of files.
type Contents struct {
	table  *Table
	ctx    context.Context
	source Source

	body  io.ReadCloser // of the layer
	at    int64         // where body is
	to    int64         // where body ends
	ahead int64
	more  bool // further files will be read

	stream int64 // the offset of the stream that is open
	in     *compression.Input
	plain  io.Reader
	close  func()
	given  int64 // bytes that were read of it

	chunks []Chunk         // the rest of the file, with the one that is being read
	left   int64           // bytes of that
	sum    digest.Verifier // of that, or nil
	err    error           // what reading the file ended with
}

// Contents starts to read contents. Close must be called.
func (t *Table) Contents(ctx context.Context, source Source) *Contents {
	return &Contents{table: t, ctx: ctx, source: source, ahead: leastAhead}
}

// Close ends reading.
func (c *Contents) Close() {
	c.end()
	if c.body != nil {
		_ = c.body.Close()
		c.body = nil
	}
}

// Open makes the chunks of a file what is read. more says that other files will follow.
func (c *Contents) Open(chunks []Chunk, more bool) {
	c.chunks, c.left, c.err, c.more = chunks, 0, nil, more
}

// Read reads the file. Every chunk that has a digest is verified when its last byte is read. DataLoss: the content is not what the table
// says. Errors of the source keep their class. After an error every Read returns it, until Open.
func (c *Contents) Read(p []byte) (n int, err error) {
	if c.err == nil {
		n, c.err = c.read(p)
	}
	return n, c.err
}

func (c *Contents) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(c.chunks) == 0 {
		return 0, io.EOF
	}
	if c.left == 0 {
		if err := c.begin(c.chunks[0]); err != nil {
			return 0, err
		}
	}
	n, err := c.plain.Read(p[:min(int64(len(p)), c.left)])
	c.given, c.left = c.given+int64(n), c.left-int64(n)
	if c.sum != nil {
		_, _ = c.sum.Write(p[:n])
	}
	if c.left > 0 {
		if err != nil {
			return n, c.classify(err)
		}
		return n, nil
	}
	if c.sum != nil && !c.sum.Verified() {
		return 0, dataLoss("%d bytes of a file have another digest than %s", c.chunks[0].Size, c.chunks[0].Digest)
	}
	c.chunks = c.chunks[1:]
	return n, nil
}

// begin opens the stream of a chunk, or goes on in the one that is open.
func (c *Contents) begin(k Chunk) error {
	if c.left, c.sum = k.Size, nil; k.Digest != "" {
		c.sum = k.Digest.Verifier()
	}
	if c.plain == nil || c.stream != k.Offset || c.given > k.Inner {
		c.end()
		if err := c.seek(k.Offset); err != nil {
			return err
		}
		c.stream, c.given = k.Offset, 0
		c.in = &compression.Input{Reader: &segment{c, c.table.end(k.Offset), leastNeed + k.Inner + k.Size, c.more}}
		r := bufio.NewReader(c.in)
		head, err := r.Peek(4)
		if err == nil && compression.Sniff(head) == compression.None {
			err = errors.New("it is not compressed")
		}
		if err == nil {
			c.plain, c.close, err = compression.NewReader(r)
		}
		if err != nil {
			c.plain = nil
			return c.classify(err)
		}
	}
	n, err := io.CopyN(io.Discard, c.plain, k.Inner-c.given)
	if c.given += n; err != nil {
		return c.classify(err)
	}
	return nil
}

func (c *Contents) end() {
	if c.plain != nil {
		c.close()
		c.plain = nil
	}
}

// classify ends the stream, which waits for what reads ahead in it, and returns the error with its class.
func (c *Contents) classify(err error) error {
	c.end()
	if c.in.Err != nil {
		return c.in.Err
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return dataLoss("a file does not decompress: %w", err)
}

// seek makes an offset of the layer the one that is read next. What lies close ahead is read, and not asked for again.
func (c *Contents) seek(offset int64) error {
	if c.body != nil && c.at <= offset && offset <= c.to && offset-c.at <= gap {
		n, err := io.CopyN(io.Discard, c.body, offset-c.at)
		if c.at += n; err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if c.body != nil {
		_ = c.body.Close()
		c.body = nil
	}
	c.at, c.to = offset, offset
	return nil
}

// A segment reads the layer up to an offset. need is how many bytes are fetched at once. more is Contents' when the stream was opened: zstd
// reads in a goroutine, beside Open.
type segment struct {
	*Contents
	end, need int64
	more      bool
}

func (s *segment) Read(p []byte) (int, error) {
	c := s.Contents
	if c.at >= s.end {
		return 0, io.EOF
	}
	if c.at == c.to {
		if c.body != nil {
			_ = c.body.Close()
			c.body = nil
		}
		to := min(s.end, c.at+s.need) // the stream may go on with other files
		if s.more {
			to = min(max(to, c.at+c.ahead), max(to, c.table.offset))
			c.ahead = min(2*c.ahead, mostAhead)
		}
		body, err := c.source(c.ctx, c.at, to)
		if err != nil {
			return 0, err
		}
		c.body, c.to = body, to
	}
	n, err := c.body.Read(p[:min(int64(len(p)), s.end-c.at, c.to-c.at)])
	if c.at += int64(n); err == io.EOF {
		if err = nil; c.at < c.to {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}
