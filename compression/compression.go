// Package compression tells how a stream is compressed by its first bytes, and reads layers' compressions.
package compression

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"distkit/compression/inflate"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// Format is a compression. A media type of a layer ends with "+" and the format's name, or with nothing if it is None.
type Format string

// Formats that can be told by their first bytes.
const (
	None     Format = ""
	Gzip     Format = "gzip"
	Zstd     Format = "zstd"
	Bzip2    Format = "bzip2"
	XZ       Format = "xz"
	LZ4      Format = "lz4"
	LZMA     Format = "lzma"
	Lzip     Format = "lzip"
	Compress Format = "compress"
)

// HeadSize is the number of bytes that Sniff wants to see. Fewer do where a stream is shorter.
const HeadSize = 13

// maxWindow is the largest zstd window accepted, the limit of zstd(1) itself. It bounds what a hostile frame makes us
// hold.
const maxWindow = 128 << 20

// magics are the first bytes of each format but for those that a function tells.
var magics = []struct {
	Format
	head string
}{
	{Gzip, "\x1f\x8b"},
	{Zstd, "\x28\xb5\x2f\xfd"},
	{XZ, "\xfd7zXZ\x00"},
	{LZ4, "\x04\x22\x4d\x18"},
	{LZ4, "\x02\x21\x4c\x18"}, // its form before version 1.4
	{Lzip, "LZIP\x01"},
	{Compress, "\x1f\x9d"},
}

// Input remembers the error of the reader that it wraps, to tell it from those of a decompressor. io.EOF does not count.
type Input struct {
	io.Reader
	Err error
}

func (i *Input) Read(p []byte) (int, error) {
	n, err := i.Reader.Read(p)
	if err != nil && err != io.EOF {
		i.Err = err
	}
	return n, err
}

// Sniff tells the format of a stream that begins with head.
func Sniff(head []byte) Format {
	for _, m := range magics {
		if bytes.HasPrefix(head, []byte(m.head)) {
			return m.Format
		}
	}
	switch {
	case len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18":
		return Zstd // a skippable frame; lz4 has those too, but its writers begin with none (RFC 8878, 3.1.2)
	case isBzip2(head):
		return Bzip2
	case isLZMA(head):
		return LZMA
	}
	return None
}

// isBzip2 reports whether head is that of bzip2: a level, and then a block or the end of the stream. "BZh" alone may be a
// file's name, with which a tar begins.
func isBzip2(head []byte) bool {
	const block, end = "1AY&SY", "\x17rE8P\x90"
	if len(head) < 10 || string(head[:3]) != "BZh" || head[3] < '1' || head[3] > '9' {
		return false
	}
	return string(head[4:10]) == block || string(head[4:10]) == end
}

// isLZMA reports whether head is that of the lzma format, which has no magic number: the properties that lzma(1)
// writes, a dictionary of a plausible size, and a size that is unknown or below 256 GiB.
func isLZMA(head []byte) bool {
	if len(head) < HeadSize || head[0] != 0x5d {
		return false
	}
	dictionary, size := binary.LittleEndian.Uint32(head[1:]), binary.LittleEndian.Uint64(head[5:])
	return dictionary >= 1<<12 && dictionary&(1<<12-1) == 0 && (size == 1<<64-1 || size < 1<<38)
}

// NewReader returns the plain bytes of r, which is compressed with gzip or zstd, or plain. close releases what the
// decompressor holds. An empty stream is io.EOF, every other format NotImplemented.
func NewReader(r *bufio.Reader) (plain io.Reader, close func(), err error) {
	return NewReaderInTurn(r, nil)
}

// NewReaderInTurn is NewReader for one of many readers. It calls large, unless that is nil, before it takes memory for a zstd window of
// more than [LargeWindow]. If that fails, so does the read that needed it.
func NewReaderInTurn(r *bufio.Reader, large func() error) (plain io.Reader, close func(), err error) {
	return NewIndexer(r, large, nil)
}

// Points is told where decompression of a stream can begin: see [inflate.NewIndexer].
type Points interface {
	// Begin is called once, before anything else.
	Begin(Format)
	Wants(out int64) bool
	Add(inflate.Point)
}

// NewIndexer is NewReaderInTurn, and tells points of the stream, unless they are nil. Only gzip has any.
func NewIndexer(r *bufio.Reader, large func() error, points Points) (plain io.Reader, close func(), err error) {
	head, err := r.Peek(HeadSize)
	if len(head) == 0 {
		return nil, nil, err
	}
	format := Sniff(head)
	if points != nil {
		points.Begin(format)
	}
	switch format {
	case None:
		return r, func() {}, nil
	case Gzip:
		if points != nil {
			return inflate.NewIndexer(r, points.Wants, points.Add), func() {}, nil
		}
		return inflate.NewReader(r), func() {}, nil
	case Zstd:
		z, err := zstd.NewReader(&windows{r: r, large: large}, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	default:
		return nil, nil, errclass.As(fmt.Errorf("compressed with %s: only gzip, zstd and plain layers are supported", format), errdefs.ErrNotImplemented)
	}
}
