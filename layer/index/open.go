package index

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"math"

	"distkit/compression"
	"distkit/layer"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// An Index is an open index of a layer.
type Index struct {
	doc     document
	sums    [][32]byte // digests of the chunks
	points  []int      // chunks where decompression can begin
	windows io.ReaderAt
	at      []int64 // offsets of the chunks' windows
	entries *io.SectionReader
}

// Open opens an index of size bytes. ErrDataLoss: it is not a valid index.
//
// The index is not verified against a layer: its author decides what [Index.Files] returns as the layer's files.
func Open(r io.ReaderAt, size int64) (*Index, error) {
	x, err := open(r, size)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) {
		err = dataLoss("not an index of a layer: %w", err)
	}
	return x, err
}

func open(r io.ReaderAt, size int64) (*Index, error) {
	all := io.NewSectionReader(r, 0, size)
	archive := tar.NewReader(all)
	x := &Index{}
	for _, name := range []string{documentName, windowsName, entriesName} {
		h, err := archive.Next()
		if err != nil {
			return nil, err
		}
		if h.Name != name || h.Typeflag != tar.TypeReg || layer.Sparse(h) {
			return nil, dataLoss("not an index of a layer: it has %.40q where %s belongs", h.Name, name)
		}
		if name == documentName {
			if h.Size > maxDocument {
				return nil, dataLoss("index: %s has %d bytes", name, h.Size)
			}
			b, err := io.ReadAll(archive)
			if err != nil {
				return nil, err
			}
			if bytes.Count(b, []byte("{")) > maxChunks+2 || bytes.Count(b, []byte(",")) > 6*maxChunks {
				return nil, dataLoss("index: %s has too many members", name)
			}
			if err := json.Unmarshal(b, &x.doc); err != nil {
				return nil, dataLoss("index: %s: %w", name, err)
			}
			continue
		}
		begin, err := all.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if h.Size > size-begin {
			return nil, dataLoss("index ends too early")
		}
		section := io.NewSectionReader(r, begin, h.Size)
		if name == windowsName {
			x.windows = section
			if err := x.check(h.Size); err != nil {
				return nil, err
			}
		} else {
			x.entries = section
		}
	}
	return x, nil
}

// check validates the document. windows is the size of the file of windows.
func (x *Index) check(windows int64) error {
	d := &x.doc
	switch {
	case d.Version != 1:
		return dataLoss("index has version %d, not 1", d.Version)
	case digest.Digest(d.Layer.Digest).Validate() != nil || digest.Digest(d.DiffID).Validate() != nil:
		return dataLoss("index: a digest is malformed")
	case d.Size <= 0 || d.Layer.Size <= 0 || d.Size > math.MaxInt64/1024 || d.Layer.Size > math.MaxInt64/1024 || len(d.Chunks) == 0 || d.Entries < 0:
		return dataLoss("index: a number is out of range")
	}
	switch compression.Format(d.Compression) {
	case compression.None:
		if d.Size != d.Layer.Size {
			return dataLoss("index: the layer is plain, and has two sizes")
		}
	case compression.Gzip, compression.Zstd:
	default:
		return dataLoss("index: compression %.20q is not known", d.Compression)
	}
	used, bit := int64(0), int64(0)
	for i, c := range d.Chunks {
		var sum [32]byte
		if n, err := hex.Decode(sum[:], []byte(c.SHA256)[:min(64, len(c.SHA256))]); err != nil || n != 32 || len(c.SHA256) != 64 {
			return dataLoss("index: the digest of chunk %d is malformed", i)
		}
		x.sums, x.at = append(x.sums, sum), append(x.at, used)
		length := x.end(i) - c.Offset
		switch {
		case i == 0 && (c.Offset != 0 || c.Bit != 0 || c.Window != 0), length <= 0, length > maxChunk, c.Window < 0, c.Window > 2*maxWindow, c.Bit < 0,
			c.Bit > 8*d.Layer.Size, c.Bit > 0 && c.Bit <= bit:
			return dataLoss("index: chunk %d is malformed", i)
		}
		d.Chunks[i].SHA256 = "" // kept in sums, which takes less memory
		if i == 0 || c.Bit > 0 {
			x.points = append(x.points, i)
		}
		bit = max(bit, c.Bit)
		if used += c.Window; used > windows {
			return dataLoss("index: windows are missing")
		}
	}
	return nil
}

// end returns the offset of the end of a chunk.
func (x *Index) end(i int) int64 {
	if i+1 < len(x.doc.Chunks) {
		return x.doc.Chunks[i+1].Offset
	}
	return x.doc.Size
}

// Layer returns the digest and size of the layer that the index is for.
func (x *Index) Layer() (digest.Digest, int64) {
	return digest.Digest(x.doc.Layer.Digest), x.doc.Layer.Size
}

// window returns the window of a chunk.
func (x *Index) window(i int) ([]byte, error) {
	n := x.doc.Chunks[i].Window
	if n == 0 {
		return nil, nil
	}
	b := make([]byte, n)
	if _, err := x.windows.ReadAt(b, x.at[i]); err != nil && err != io.EOF {
		return nil, err
	}
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*maxWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	if b, err = z.DecodeAll(b, nil); err != nil {
		return nil, dataLoss("index: the window of chunk %d: %w", i, err)
	}
	return b, nil
}
