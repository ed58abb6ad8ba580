package toc

import (
	"archive/tar"
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"distkit/compression"
	"distkit/layer"

	"github.com/opencontainers/go-digest"
)

// Entries reads the files of a table, in its order.
type Entries struct {
	table  *Table
	ctx    context.Context
	close  func()
	in     bounded
	json   *json.Decoder
	ahead  *entry
	source compression.Input
}

// A Chunk is a part of a file: so many bytes of the stream that is compressed at an offset of the layer, behind Inner bytes of that stream.
type Chunk struct {
	Offset, Inner, Size int64
	Digest              digest.Digest // of the plain bytes, or ""
}

// An entry is a file of the table, or a further chunk of the file before it.
type entry struct {
	Type     string            `json:"type"`
	Name     string            `json:"name"`
	LinkName string            `json:"linkName"`
	Mode     int64             `json:"mode"`
	Size     int64             `json:"size"`
	UID      int               `json:"uid"`
	GID      int               `json:"gid"`
	ModTime  time.Time         `json:"modtime"`
	DevMajor int64             `json:"devMajor"`
	DevMinor int64             `json:"devMinor"`
	Xattrs   map[string][]byte `json:"xattrs"`

	Offset      int64         `json:"offset"`
	InnerOffset int64         `json:"innerOffset"`
	Digest      digest.Digest `json:"digest"`
	ChunkOffset int64         `json:"chunkOffset"`
	ChunkSize   int64         `json:"chunkSize"` // 0 is all that is left of the file
	ChunkDigest digest.Digest `json:"chunkDigest"`
}

const chunkType = "chunk"

var flags = map[string]byte{"reg": tar.TypeReg, "dir": tar.TypeDir, "symlink": tar.TypeSymlink, "hardlink": tar.TypeLink, "char": tar.TypeChar,
	"block": tar.TypeBlock, "fifo": tar.TypeFifo}

// bounded bounds the bytes of tables together, and of the value that is being read.
type bounded struct {
	r     io.Reader
	total *atomic.Int64 // bytes that were read of all
	value int64
	sum   io.Writer // gets what is read
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.total.Add(int64(n)) > maxPlain {
		return 0, fmt.Errorf("those of all layers have more than %d bytes together, decompressed", maxPlain)
	}
	if b.value -= int64(n); b.value < 0 {
		return 0, errors.New("an entry is too large")
	}
	_, _ = b.sum.Write(p[:n])
	return n, err
}

// Entries starts to read the files. Close must be called.
func (t *Table) Entries(ctx context.Context) (*Entries, error) {
	return t.entries(ctx, &atomic.Int64{}, io.Discard)
}

// entries adds the bytes that are read of the table to total, and writes them to sum.
func (t *Table) entries(ctx context.Context, total *atomic.Int64, sum io.Writer) (*Entries, error) {
	e := &Entries{table: t, ctx: ctx, source: compression.Input{Reader: io.NewSectionReader(t.file, 0, t.size)}}
	r, closer, err := compression.NewReader(bufio.NewReader(&e.source))
	if err != nil {
		return nil, e.classify(err)
	}
	e.close = closer
	if t.archive {
		archive := tar.NewReader(r)
		h, err := archive.Next()
		if err == nil && (h.Name != "stargz.index.json" || h.Typeflag != tar.TypeReg) {
			err = errors.New("it has another name")
		}
		if err != nil {
			closer()
			return nil, e.classify(err)
		}
		r = archive
	}
	e.in = bounded{r: r, total: total, value: maxValue, sum: sum}
	e.json = json.NewDecoder(&e.in)
	if err := e.begin(); err != nil {
		closer()
		return nil, e.classify(err)
	}
	return e, nil
}

// Close ends reading.
func (e *Entries) Close() { e.close() }

// begin reads up to the first entry.
func (e *Entries) begin() error {
	if err := e.want(json.Delim('{')); err != nil {
		return err
	}
	for e.json.More() {
		key, err := e.json.Token()
		if err != nil {
			return err
		}
		if key == "entries" {
			return e.want(json.Delim('['))
		}
		var skipped json.RawMessage
		if err := e.json.Decode(&skipped); err != nil {
			return err
		}
	}
	return errors.New("it has no entries")
}

func (e *Entries) want(token json.Token) error {
	got, err := e.json.Token()
	if err == nil && got != token {
		err = errors.New("its JSON has another form")
	}
	return err
}

// read returns the next entry or chunk, or io.EOF.
func (e *Entries) read() (*entry, error) {
	if v := e.ahead; v != nil {
		e.ahead = nil
		return v, nil
	}
	if err := e.ctx.Err(); err != nil {
		return nil, err
	}
	e.in.value = maxValue
	if !e.json.More() {
		if err := e.want(json.Delim(']')); err != nil {
			return nil, e.classify(err)
		}
		return nil, io.EOF
	}
	v := &entry{}
	if err := e.json.Decode(v); err != nil {
		return nil, e.classify(err)
	}
	return v, nil
}

// Next returns the next file and the chunks of its content, or io.EOF. DataLoss: the table is malformed.
func (e *Entries) Next() (*tar.Header, []Chunk, error) {
	v, err := e.read()
	if err != nil {
		return nil, nil, err
	}
	flag, known := flags[v.Type]
	if !known || v.Size < 0 || v.Size > maxSize {
		return nil, nil, dataLoss("entry %.200q: type %.20q, %d bytes", v.Name, v.Type, v.Size)
	}
	h := &tar.Header{Typeflag: flag, Name: v.Name, Linkname: v.LinkName, Mode: v.Mode & 0o7777, Uid: v.UID, Gid: v.GID, ModTime: v.ModTime,
		Devmajor: v.DevMajor, Devminor: v.DevMinor}
	for name, value := range v.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[layer.XattrRecord+layer.EscapeName(name)] = string(value)
	}
	if h.ModTime.IsZero() {
		h.ModTime = time.Unix(0, 0)
	}
	var chunks []Chunk
	if flag == tar.TypeReg {
		if h.Size = v.Size; v.Size > 0 {
			if chunks, err = e.chunks(v); err != nil {
				return nil, nil, err
			}
		}
	}
	return h, chunks, nil
}

// chunks returns the chunks of a file, those of the entries that follow it among them.
func (e *Entries) chunks(file *entry) ([]Chunk, error) {
	var list []Chunk
	read := int64(0)
	for v := file; ; {
		size := v.ChunkSize
		if size == 0 {
			size = file.Size - read
		}
		sum := v.ChunkDigest
		if sum == "" && size == file.Size {
			sum = file.Digest
		}
		fault := ""
		switch {
		case len(list) == maxChunks:
			fault = "is one too many"
		case v.ChunkOffset != read || size <= 0 || size > file.Size-read:
			fault = fmt.Sprintf("has %d bytes at %d, after %d of %d bytes", size, v.ChunkOffset, read, file.Size)
		case v.Offset < 0 || v.Offset >= e.table.offset:
			fault = fmt.Sprintf("has offset %d, in a layer with %d bytes of files", v.Offset, e.table.offset)
		case v.InnerOffset < 0 || v.InnerOffset > maxInner:
			fault = fmt.Sprintf("has inner offset %d", v.InnerOffset)
		case v.Offset == 0 && v.InnerOffset == 0: // a header is before each file
			fault = "has no offset"
		case sum != "" && sum.Validate() != nil:
			fault = "has a malformed digest"
		}
		if fault != "" {
			return nil, dataLoss("file %.200q: chunk %d %s", file.Name, len(list), fault)
		}
		list = append(list, Chunk{v.Offset, v.InnerOffset, size, sum})
		if read += size; read == file.Size {
			return list, nil
		}
		var err error
		if v, err = e.read(); err == io.EOF || err == nil && v.Type != chunkType {
			return nil, dataLoss("file %.200q: chunks are missing", file.Name)
		} else if err != nil {
			return nil, err
		}
	}
}

func (e *Entries) classify(err error) error {
	if e.source.Err != nil {
		return e.source.Err
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return dataLoss("%w", err)
}
