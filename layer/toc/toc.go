// Package toc reads the tables of contents that some layers hold themselves: those of eStargz, which are compressed with gzip, and
// those of zstd:chunked. With it single files of such a layer are read by ranges.
//
// The specifications are docs/estargz.md of github.com/containerd/stargz-snapshotter, and the package pkg/chunked of
// github.com/containers/storage. The tables of both have the form of CRFS: a JSON object whose "entries" are the files.
//
// Who made the layer decides what its table says. It may list other files than the layer's archive has, so that what is read by it is
// not what other programs unpack. Digests of contents are in the table, and are verified.
package toc

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Source returns the bytes of the layer in [from, to).
type Source = func(ctx context.Context, from, to int64) (io.ReadCloser, error)

// Annotations of a layer's descriptor. The digest of eStargz is that of the plain table, that of zstd:chunked of the compressed one.
const (
	annotationDigest = "containerd.io/snapshot/stargz/toc.digest"
	manifestPosition = "zstd-chunked.manifest-position"
	manifestChecksum = "zstd-chunked.manifest-checksum"
)

// prefixes are those that zstd:chunked's annotations have: of containers/storage, and of stargz-snapshotter.
var prefixes = []string{"io.github.containers.", "io.containers."}

const (
	maxPacked  = 64 << 20  // bytes of a compressed table
	maxFetched = 256 << 20 // and of all in a budget
	maxPlain   = 512 << 20 // bytes of all tables in a budget
	maxValue   = 1 << 20   // and of one entry
	maxOffsets = 1 << 22   // places in a layer
	fewOffsets = 1 << 16   // so many are noted before any are compared
	maxChunks  = 1 << 20   // of a file
	maxSize    = 1<<39 - 1 // of a file
	maxInner   = 64 << 20  // bytes of a compressed stream before a file
)

// A Table is a layer's table of contents. It has been read once, and its digest is the one that the layer's descriptor has.
type Table struct {
	position
	file    *os.File // the compressed table
	offsets []int64  // where compressed streams begin, ascending
}

// A Budget bounds the tables of an image together: the bytes that are fetched, and the plain bytes. The zero value is unused. It is safe for
// concurrent use.
type Budget struct{ fetched, plain atomic.Int64 }

// position is where a layer has its table.
type position struct {
	offset, size int64
	archive      bool          // the table is a file of a tar archive
	packed       digest.Digest // of the compressed table, or ""
	plain        digest.Digest // of the table, or ""
}

// Find reads the table of contents of a layer into a temporary file that file makes. It returns nil if the layer has none. DataLoss: the table is
// malformed, does not have its digest, or exceeds the budget. Errors of the source keep their class.
func Find(ctx context.Context, layer v1.Descriptor, source Source, budget *Budget, file func() (*os.File, error)) (*Table, error) {
	at, err := locate(ctx, layer, source)
	if err != nil || at.size == 0 {
		return nil, err
	}
	if at.offset <= 0 || at.size < 0 || at.size > maxPacked || at.offset > layer.Size-at.size {
		return nil, dataLoss("it has %d bytes at %d, in a layer of %d", at.size, at.offset, layer.Size)
	}
	if budget.fetched.Add(at.size) > maxFetched {
		return nil, dataLoss("those of all layers have more than %d bytes together", maxFetched)
	}
	t := &Table{position: at}
	if t.file, err = file(); err != nil {
		return nil, err
	}
	if err = t.fetch(ctx, source); err == nil {
		err = t.check(ctx, budget)
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Close frees the temporary file.
func (t *Table) Close() { _ = t.file.Close() }

// locate finds where the table is: by the descriptor's annotations, or by the end of the layer.
func locate(ctx context.Context, layer v1.Descriptor, source Source) (position, error) {
	at := position{plain: digest.Digest(layer.Annotations[annotationDigest])}
	for _, p := range prefixes {
		text, ok := layer.Annotations[p+manifestPosition]
		if !ok {
			continue
		}
		at.packed = digest.Digest(layer.Annotations[p+manifestChecksum])
		var numbers [4]int64
		parts := strings.Split(text, ":")
		for i := range numbers {
			var err error
			if i < len(parts) {
				numbers[i], err = strconv.ParseInt(parts[i], 10, 64)
			}
			if err != nil || len(parts) != len(numbers) {
				return at, dataLoss("annotation %s: %.80q", p+manifestPosition, text)
			}
		}
		if numbers[3] == 1 {
			at.offset, at.size = numbers[0], max(numbers[1], 1)
		}
		break
	}
	for _, d := range []digest.Digest{at.plain, at.packed} {
		if d != "" && d.Validate() != nil {
			return at, dataLoss("its digest in the annotations of the layer is malformed")
		}
	}
	if at.size > 0 {
		return at, nil
	}
	const most = 8 + 64
	tail := make([]byte, min(most, layer.Size))
	r, err := source(ctx, layer.Size-int64(len(tail)), layer.Size)
	if err != nil {
		return at, err
	}
	defer r.Close()
	if _, err := io.ReadFull(r, tail); err != nil {
		return at, fmt.Errorf("the end of the layer: %w", err)
	}
	at.footer(tail, layer.Size)
	return at, nil
}

// footer reads the end of a layer: an empty gzip member whose extra field has the table's offset, or a skippable frame of zstd. at.size is
// 0 if it is neither.
func (at *position) footer(tail []byte, size int64) {
	const stargz = "STARGZ"
	for _, form := range []struct {
		length int
		extra  string // before the offset
	}{{51, "\x1a\x00SG\x16\x00"}, {47, "\x16\x00"}} {
		if len(tail) < form.length {
			continue
		}
		b := tail[len(tail)-form.length:]
		hex, ok := bytes.CutPrefix(b[10:], []byte(form.extra))
		if ok && bytes.HasPrefix(b, []byte("\x1f\x8b\x08\x04")) && string(hex[16:22]) == stargz {
			if n, err := strconv.ParseInt(string(hex[:16]), 16, 64); err == nil {
				at.offset, at.size, at.archive = n, size-int64(form.length)-n, true
			}
			return
		}
	}
	for _, form := range []struct {
		length int
		magic  string
	}{{64, "GNUlInUx"}, {40, "GnUlInUx"}} {
		if len(tail) < 8+form.length {
			continue
		}
		b := tail[len(tail)-8-form.length:]
		if bytes.HasPrefix(b, []byte("\x50\x2a\x4d\x18")) && int(binary.LittleEndian.Uint32(b[4:])) == form.length && bytes.HasSuffix(b, []byte(form.magic)) &&
			binary.LittleEndian.Uint64(b[8+24:]) == 1 {
			at.offset, at.size = int64(binary.LittleEndian.Uint64(b[8:])), int64(binary.LittleEndian.Uint64(b[16:]))
			return
		}
	}
}

// fetch copies the compressed table into the file.
func (t *Table) fetch(ctx context.Context, source Source) error {
	r, err := source(ctx, t.offset, t.offset+t.size)
	if err != nil {
		return err
	}
	defer r.Close()
	sum := digest.SHA256
	if t.packed != "" {
		sum = t.packed.Algorithm()
	}
	digester := sum.Digester()
	n, err := io.Copy(io.MultiWriter(t.file, digester.Hash()), io.LimitReader(r, t.size))
	if err == nil && n != t.size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	if got := digester.Digest(); t.packed != "" && got != t.packed {
		return dataLoss("digest mismatch: got %s", got)
	}
	return nil
}

// check reads the whole table, notes where compressed streams begin, and compares the digest.
func (t *Table) check(ctx context.Context, budget *Budget) error {
	sum := digest.SHA256
	if t.plain != "" {
		sum = t.plain.Algorithm()
	}
	digester := sum.Digester()
	e, err := t.entries(ctx, &budget.plain, digester.Hash())
	if err != nil {
		return err
	}
	defer e.Close()
	for limit := fewOffsets; ; {
		_, chunks, err := e.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		for _, c := range chunks {
			if n := len(t.offsets); n > 0 && t.offsets[n-1] == c.Offset {
				continue
			}
			if t.offsets = append(t.offsets, c.Offset); len(t.offsets) < limit {
				continue
			}
			if err := t.compact(); err != nil {
				return err
			}
			limit = max(2*len(t.offsets), fewOffsets)
		}
	}
	if err := t.compact(); err != nil {
		return err
	}
	t.offsets = slices.Clone(t.offsets)
	e.in.value = maxPlain
	if _, err := io.Copy(io.Discard, &e.in); err != nil {
		return e.classify(err)
	}
	if got := digester.Digest(); t.plain != "" && got != t.plain {
		return dataLoss("digest mismatch: got %s", got)
	}
	return nil
}

// compact sorts the offsets and keeps one of each.
func (t *Table) compact() error {
	slices.Sort(t.offsets)
	if t.offsets = slices.Compact(t.offsets); len(t.offsets) > maxOffsets {
		return dataLoss("it names more than %d places of the layer", maxOffsets)
	}
	return nil
}

// end returns where the compressed stream ends, at the latest, that begins at an offset.
func (t *Table) end(offset int64) int64 {
	if i, _ := slices.BinarySearch(t.offsets, offset+1); i < len(t.offsets) {
		return t.offsets[i]
	}
	return t.offset
}

func dataLoss(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, "table of contents: "+format, a...)
}
