// Package compression detects how a stream is compressed, and decompresses layers.
//
// [Sniff] names the [Format] of a stream by its first bytes. [NewReader] decompresses gzip and zstd and passes plain
// streams on; [NewReaderInTurn] does so for one of many readers that share a budget for large zstd windows, and
// [NewIndexer] also reports where decompression of a gzip stream can start. Gzip is read by package inflate, below this
// one, and zstd by github.com/klauspost/compress.
//
// Input is untrusted: a zstd window is at most 128 MiB. An unsupported format is errdefs.ErrNotImplemented; corrupt
// data gives the decompressor's own error. The package is a leaf, and writes nothing.
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

// Format is a compression format. The media type of a compressed layer ends with "+" and its name.
type Format string

// The formats that Sniff detects. None stands for any other stream.
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

// HeadSize is the number of bytes that Sniff needs. It may get fewer if the stream is shorter.
const HeadSize = 13

// maxWindow is the largest zstd window that is accepted, as in zstd(1). It bounds the memory that a hostile frame can
// make us use.
const maxWindow = 128 << 20

// magics are the first bytes of the formats that have a fixed magic number.
var magics = []struct {
	Format
	head string
}{
	{Gzip, "\x1f\x8b"},
	{Zstd, "\x28\xb5\x2f\xfd"},
	{XZ, "\xfd7zXZ\x00"},
	{LZ4, "\x04\x22\x4d\x18"},
	{LZ4, "\x02\x21\x4c\x18"}, // the legacy format, before version 1.4
	{Lzip, "LZIP\x01"},
	{Compress, "\x1f\x9d"},
}

// Input wraps a reader and keeps its error, so that the caller can tell it from an error of the decompressor. io.EOF is
// not kept.
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

// Sniff returns the format of a stream that begins with head.
func Sniff(head []byte) Format {
	for _, m := range magics {
		if bytes.HasPrefix(head, []byte(m.head)) {
			return m.Format
		}
	}
	switch {
	case len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18":
		return Zstd // a skippable frame. lz4 has these too, but no lz4 writer begins with one (RFC 8878, 3.1.2)
	case isBzip2(head):
		return Bzip2
	case isLZMA(head):
		return LZMA
	}
	return None
}

// isBzip2 reports whether head begins a bzip2 stream: "BZh", a level, and a block or the end of the stream. "BZh" alone
// could be the name of a file at the beginning of a tar.
func isBzip2(head []byte) bool {
	const block, end = "1AY&SY", "\x17rE8P\x90"
	if len(head) < 10 || string(head[:3]) != "BZh" || head[3] < '1' || head[3] > '9' {
		return false
	}
	return string(head[4:10]) == block || string(head[4:10]) == end
}

// isLZMA reports whether head looks like the lzma format, which has no magic number. It must have the properties that
// lzma(1) writes, a plausible dictionary size, and a size that is unknown or less than 256 GiB.
func isLZMA(head []byte) bool {
	if len(head) < HeadSize || head[0] != 0x5d {
		return false
	}
	dictionary, size := binary.LittleEndian.Uint32(head[1:]), binary.LittleEndian.Uint64(head[5:])
	return dictionary >= 1<<12 && dictionary&(1<<12-1) == 0 && (size == 1<<64-1 || size < 1<<38)
}

// NewReader returns the plain bytes of r, which may be compressed with gzip or zstd, or not at all. close frees the
// decompressor. The error is io.EOF for an empty stream, and NotImplemented for any other format.
func NewReader(r *bufio.Reader) (plain io.Reader, close func(), err error) {
	return NewReaderInTurn(r, nil)
}

// NewReaderInTurn is [NewReader] for one of many readers. If large is not nil it is called before memory is allocated
// for a zstd window larger than [LargeWindow]. If large fails, the Read that needed the window returns its error.
func NewReaderInTurn(r *bufio.Reader, large func() error) (plain io.Reader, close func(), err error) {
	return NewIndexer(r, large, nil)
}

// Points receives the points of a stream at which decompression can start; see [inflate.NewIndexer] for Wants and Add.
type Points interface {
	// Begin is called once, before the other methods.
	Begin(Format)
	Wants(out int64) bool
	Add(inflate.Point)
}

// NewIndexer is [NewReaderInTurn] and also reports the stream's points, unless points is nil. Only gzip streams have
// points.
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
