// Package index makes and reads indexes of layers. With an index, single files of a layer can be read without the rest
// of it. dist-index(5), in dist-index.5.md beside this file, specifies the format.
//
// A [Builder] makes an index while it reads the layer once. [Open] opens an index. [Index.Entries] lists the layer's
// entries, and [Index.Files] reads files, for which it asks a [Source] for ranges of the compressed layer.
//
// An index is trusted as far as its author is: what [Open], Entries and Files return is what the index claims about the
// layer. They check that the layer's bytes match the index, and that reading it stays within bounds. DataLoss: the
// index is malformed, or the layer differs from it. InvalidArgument: the files have too many holes.
package index

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

// MediaType is the media type of an index.
const MediaType = "application/vnd.distkit.layer.index.v1.tar"

// The files in the archive that is an index, in this order.
const (
	documentName = "index.json"
	windowsName  = "windows"
	entriesName  = "entries.zst"
)

const (
	// interval is the least distance between chunks in plain bytes, except for the last chunk. In layers larger than
	// intervals times that, it grows in proportion.
	interval, intervals = 1 << 20, 4096
	maxInterval         = 8 << 20
	// stretch is how many intervals a chunk may span if decompression can't begin at its end.
	stretch  = 4
	maxChunk = stretch * maxInterval

	maxDocument = 32 << 20
	maxChunks   = 1 << 18
	maxWindow   = 32 << 10
	maxRecord   = 64 << 10

	// maxDensity bounds the bytes of headers per byte of their compressed form. The first leastHeaders bytes are always
	// allowed.
	maxDensity, leastHeaders = 4096, 16 << 20
)

// A document is the content of index.json in an index.
type document struct {
	Version     int    `json:"version"`
	Layer       blob   `json:"layer"`
	DiffID      string `json:"diffID"`
	Size        int64  `json:"size"`
	Compression string `json:"compression,omitempty"`
	Entries     int64  `json:"entries"`
	// Chunks are consecutive parts of the plain layer.
	Chunks []chunk `json:"chunks"`
}

type blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

type chunk struct {
	Offset int64  `json:"offset"`
	SHA256 string `json:"sha256"`
	// Bit is the position in the compressed layer where decompression can begin. It is 0 for the first chunk.
	Bit    int64 `json:"bit,omitempty"`
	Member bool  `json:"member,omitempty"`
	Window int64 `json:"window,omitempty"` // size of its compressed form in bytes
}

// distance returns the least distance from a chunk at offset to the next one.
func distance(offset int64) int64 {
	return min(max(interval, offset/intervals/512*512), maxInterval)
}

func dataLoss(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}
