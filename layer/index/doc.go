// Package index makes indexes of layers, with which single files of a layer are read without the rest. The page dist-index(5),
// dist-index.5.md beside this file, specifies the form of an index.
//
// Whoever wrote an index decides what it says of the layer: see [Open].
package index

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

// MediaType is that of an index.
const MediaType = "application/vnd.distkit.layer.index.v1.tar"

// The files of the archive that an index is, in this order.
const (
	documentName = "index.json"
	windowsName  = "windows"
	entriesName  = "entries.zst"
)

const (
	// interval is the least distance of the chunks of a layer in its plain bytes, but for the last. It grows in proportion in layers that
	// are larger than intervals times that.
	interval, intervals = 1 << 20, 4096
	maxInterval         = 8 << 20
	// stretch is how many intervals a chunk may have where decompression can't begin at its end.
	stretch  = 4
	maxChunk = stretch * maxInterval

	maxDocument = 32 << 20
	maxChunks   = 1 << 18
	maxWindow   = 32 << 10
	maxRecord   = 64 << 10

	// maxDensity bounds the bytes of headers for each byte of their compressed form, and least is free.
	maxDensity, leastHeaders = 4096, 16 << 20
)

// A document is the index.json of an index.
type document struct {
	Version     int    `json:"version"`
	Layer       blob   `json:"layer"`
	DiffID      string `json:"diffID"`
	Size        int64  `json:"size"`
	Compression string `json:"compression,omitempty"`
	Entries     int64  `json:"entries"`
	// Chunks are parts of the plain layer, one after another.
	Chunks []chunk `json:"chunks"`
}

type blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

type chunk struct {
	Offset int64  `json:"offset"`
	SHA256 string `json:"sha256"`
	// Bit is where decompression can begin, in the compressed layer. The first chunk has 0.
	Bit    int64 `json:"bit,omitempty"`
	Member bool  `json:"member,omitempty"`
	Window int64 `json:"window,omitempty"` // bytes of its compressed form
}

// distance returns how far the next chunk begins at least behind one at an offset.
func distance(offset int64) int64 {
	return min(max(interval, offset/intervals/512*512), maxInterval)
}

func dataLoss(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}
