// Package batch implements the protocol of dist-batch(7): many requests and objects over one pair of pipes, so that one
// process, connection and token serve a whole image.
//
// A [Client] writes requests to a server's input and matches its answers to them, in order. [Serve] is the other end:
// it parses requests and calls a [Handler] for each, up to [Ahead] of them at the same time. Objects travel in chunks
// and end with a trailer, which tells a complete object from one that failed on the way.
//
// Neither side trusts the other. Lines, chunks, messages and requests under way are bounded. The client verifies the
// length and the digest of what it gets. An answer that breaks the protocol is DataLoss, a request that does is
// InvalidArgument, and a stream that ends too early is Aborted. The failure of a single request is an answer and ends
// nothing: it has the class of the status that the server sent.
package batch

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits of both sides.
const (
	// MaxLine is the longest line, including the newline.
	MaxLine = 4 << 10
	// MaxChunk is the largest chunk of content.
	MaxChunk = 1 << 20
	// MaxMessage is the longest message of a failure.
	MaxMessage = 1 << 10
	// Ahead is the number of requests that a server works on at the same time.
	Ahead = 8
)

const (
	bufferSize = 64 << 10
	// directSize is the size from which a chunk is written directly, not copied into the buffer.
	directSize = 16 << 10
	copySize   = 256 << 10
)

// unknown stands in a line for a digest, size or type that is not known.
const unknown = "-"

func errEnd() error {
	return errclass.Errorf(errdefs.ErrAborted, "unexpected end: the other side is gone")
}

// malformedError reports that the other side broke the protocol. Nothing more can be read from the stream.
type malformedError struct{ error }

func malformed(format string, a ...any) error {
	return malformedError{errclass.Errorf(errdefs.ErrInvalidArgument, "not understood: "+format, a...)}
}

func (e malformedError) Unwrap() error { return e.error }

// readLine reads a line. It returns io.EOF if the stream ends before the line's first byte.
func readLine(r *bufio.Reader) (string, error) {
	b, err := r.ReadSlice('\n')
	switch {
	case len(b) > MaxLine || errors.Is(err, bufio.ErrBufferFull):
		return "", malformed("a line is longer than %d bytes", MaxLine)
	case err == io.EOF && len(b) > 0:
		return "", errEnd()
	case err != nil:
		return "", err
	}
	line := string(b[:len(b)-1])
	if !isText(line) {
		return "", malformed("a line is not text")
	}
	return line, nil
}

func isText(line string) bool {
	return utf8.ValidString(line) && !strings.ContainsFunc(line, unicode.IsControl)
}

// words splits a line at single spaces.
func words(line string) ([]string, error) {
	list := strings.Split(line, " ")
	for _, w := range list {
		if w == "" {
			return nil, malformed("a line has an empty word")
		}
	}
	return list, nil
}

// ParseNumber parses a non-negative number without a sign or leading zeros. Anything else is InvalidArgument.
func ParseNumber(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || strconv.FormatUint(n, 10) != s {
		return 0, malformed("%.24q is not a number", s)
	}
	return int64(n), nil
}

// ParseRange parses the A-B of a hint range:A-B. The end it returns is the offset after B. If B is less than A, the
// error is InvalidArgument.
func ParseRange(s string) (begin, end int64, err error) {
	first, last, _ := strings.Cut(s, "-")
	begin, err = ParseNumber(first)
	if err == nil {
		end, err = ParseNumber(last)
	}
	if err == nil && (end < begin || end == math.MaxInt64) {
		err = malformed("%.48q is not a range", s)
	}
	return begin, end + 1, err
}

// content reads chunks and the trailer that follows them. Read returns io.EOF after the trailer "end". After any other
// trailer, and if the stream is broken, it returns another error.
type content struct {
	r    *bufio.Reader
	left int64 // unread bytes of the current chunk
	// trailer returns the error that a trailer other than "end" stands for. It reports false if there is no such
	// trailer.
	trailer func(line string) (error, bool)
	err     error // the error that ended reading
	broken  error // equal to err if nothing more can be read from the stream, else nil
}

func (c *content) Read(p []byte) (int, error) {
	if c.err == nil && c.left == 0 {
		if err := c.next(); err != nil {
			c.breakOff(err)
		}
	}
	if c.err != nil || len(p) == 0 {
		return 0, c.err
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.left)])
	if c.left -= int64(n); err != nil && n == 0 {
		c.breakOff(err)
	}
	return n, c.err
}

// next reads the length of the next chunk, or the trailer.
func (c *content) next() error {
	line, err := readLine(c.r)
	if err != nil {
		return err
	}
	if c.left, err = ParseNumber(line); err != nil {
		return err
	}
	if c.left > MaxChunk {
		return malformed("a chunk of %d bytes", c.left)
	}
	if c.left > 0 {
		return nil
	}
	if line, err = readLine(c.r); err != nil {
		return err
	}
	if c.err = io.EOF; line != "end" {
		ended, ok := c.trailer(line)
		if !ok {
			return malformed("the trailer is %.24q", line)
		}
		c.err = ended
	}
	return nil
}

func (c *content) breakOff(err error) {
	if err == io.EOF {
		err = errEnd()
	}
	c.err, c.broken = err, err
}

// drain reads to the end. It returns an error only if nothing more can be read from the stream.
func (c *content) drain() error {
	if c.err == nil {
		_, _ = io.CopyBuffer(io.Discard, onlyReader{c}, make([]byte, bufferSize))
	}
	return c.broken
}

type onlyReader struct{ io.Reader }

// chunks writes content as chunks. err is the first error of w.
type chunks struct {
	w   *bufio.Writer
	err error
}

func (c *chunks) Write(p []byte) (n int, err error) {
	for len(p) > 0 && c.err == nil {
		piece := p[:min(len(p), MaxChunk)]
		_, c.err = c.w.Write(strconv.AppendInt(c.w.AvailableBuffer(), int64(len(piece)), 10))
		if c.err == nil {
			c.err = c.w.WriteByte('\n')
		}
		if c.err == nil && len(piece) >= directSize {
			c.err = c.w.Flush()
		}
		if c.err == nil {
			var k int
			k, c.err = c.w.Write(piece)
			n += k
		}
		p = p[len(piece):]
	}
	return n, c.err
}

// readFrom copies r. It returns an error of reading r; an error of writing is in c.err.
func (c *chunks) readFrom(r io.Reader) error {
	var err error
	if w, ok := r.(io.WriterTo); ok && !isFile(r) {
		_, err = w.WriteTo(c)
	} else {
		_, err = io.CopyBuffer(c, onlyReader{r}, make([]byte, copySize))
	}
	if c.err != nil {
		return nil
	}
	return err
}

// isFile reports whether r is a file. The WriteTo of a file is not used: its pieces are too small.
func isFile(r io.Reader) bool {
	_, ok := r.(*os.File)
	return ok
}

// end writes the end of the chunks and a trailer.
func (c *chunks) end(trailer string) error {
	if c.err == nil {
		_, c.err = c.w.WriteString("0\n" + trailer + "\n")
	}
	return c.err
}

// describe returns an object's digest and size as words.
func describe(d digest.Digest, size int64) string {
	word := unknown
	if d != "" {
		word = string(d)
	}
	if size < 0 {
		return word + " " + unknown
	}
	return word + " " + strconv.FormatInt(size, 10)
}

// parseDescriptor parses a digest, a size and, if there is a third word, a media type.
func parseDescriptor(list []string) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{Size: -1}
	if list[0] != unknown {
		d, err := digest.Parse(list[0])
		if err != nil {
			return desc, malformed("%.24q is not a digest", list[0])
		}
		desc.Digest = d
	}
	if list[1] != unknown {
		n, err := ParseNumber(list[1])
		if err != nil {
			return desc, err
		}
		desc.Size = n
	}
	if len(list) > 2 && list[2] != unknown {
		if !isType(list[2]) {
			return desc, malformed("%.24q is not a type", list[2])
		}
		desc.MediaType = list[2]
	}
	return desc, nil
}

// typeWord returns a media type as a word.
func typeWord(mediaType string) string {
	if !isType(mediaType) {
		return unknown
	}
	return mediaType
}

// maxType is the longest media type: two names of 127 bytes and a slash (RFC 6838, section 4.2).
const maxType = 255

func isType(s string) bool {
	return len(s) <= maxType && strings.Count(s, "/") == 1 && !strings.ContainsAny(s, " \t\n")
}

// failure formats an error as an answer or a trailer.
func failure(err error) string {
	text := errclass.OneLine(strings.ToValidUTF8(err.Error(), "?"))
	if len(text) > MaxMessage {
		text = strings.ToValidUTF8(text[:MaxMessage], "") + "…"
	}
	return fmt.Sprintf("error %d %s", errclass.Status(err), cmp.Or(text, "failed"))
}

// parseFailure parses what failure has formatted. It reports false for any other line.
func parseFailure(line string) (error, bool) {
	rest, ok := strings.CutPrefix(line, "error ")
	if !ok {
		return nil, false
	}
	word, text, _ := strings.Cut(rest, " ")
	status, err := ParseNumber(word)
	if err != nil || status < 1 || status > 255 {
		return nil, false
	}
	return errclass.Remote(int(status), cmp.Or(text, "failed")), true
}
