package erofs

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"distkit/disk"
	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Files of a stored layer.
const (
	layerName  = "layer.tar" // the plain archive
	diffIDName = "diffid"    // its digest and a newline
	maxDiffID  = 256
)

// StoreOptions change what Store does. The zero value is the usual.
type StoreOptions struct {
	ExpectDiffID digest.Digest // that the layer must have, if any
	// MaxBytes bounds the bytes of the plain archive, and those of its sparse files, MaxEntries its entries. 0 is no bound.
	MaxBytes, MaxEntries int64
	Turn                 layer.Turn // as of layer.NewReaderInTurn; may be nil
}

// Stored tells what Store has stored.
type Stored struct {
	DiffID  digest.Digest `json:"diffID"`
	Size    int64         `json:"size"` // bytes of the plain archive
	Entries int64         `json:"entries"`
}

// Store writes the layer in r, plain or compressed with gzip or zstd, to an empty directory: the plain archive and its diff ID. The
// layer's entries are read, so that the archive is one, but not applied. Errors are those of Builder.Add, and leave the directory empty.
// Nothing is synced to disk.
func Store(ctx context.Context, dir string, r io.Reader, o StoreOptions) (_ Stored, err error) {
	f, err := create(dir)
	if err != nil {
		return Stored{}, err
	}
	defer func() { done(dir, f, err) }()
	in := layer.NewReaderInTurn(ctx, r, o.MaxBytes, f, o.Turn)
	defer in.Close()
	s := Stored{}
	var sparse sparseFiles
	for {
		h, err := in.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return s, err
		}
		if err := sparse.add(h, o.MaxBytes); err != nil {
			return s, fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
		if s.Entries++; o.MaxEntries > 0 && s.Entries > o.MaxEntries {
			return s, tooMuch("more than %d entries", o.MaxEntries)
		}
	}
	if err := in.End(o.ExpectDiffID); err != nil {
		return s, err
	}
	s.DiffID, s.Size = in.DiffID(), in.Size()
	return s, finish(dir, f, s.DiffID)
}

// StorePlain is Store of a plain archive whose maker is trusted to have made one: its entries are not read.
func StorePlain(dir string, r io.Reader) (err error) {
	f, err := create(dir)
	if err != nil {
		return err
	}
	defer func() { done(dir, f, err) }()
	hash := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, hash)}, r, make([]byte, bufferSize)); err != nil {
		return err
	}
	return finish(dir, f, digest.NewDigest(digest.SHA256, hash))
}

func create(dir string) (*os.File, error) {
	f, err := disk.Tree(dir).OpenFile(layerName, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if errors.Is(err, fs.ErrExist) {
		return nil, refused("%s holds a layer", dir)
	}
	return f, err
}

// done closes the archive, and deletes it if the layer was not stored.
func done(dir string, f *os.File, err error) {
	if err != nil {
		_ = disk.Tree(dir).Remove(layerName)
	}
	f.Close()
}

func finish(dir string, f *os.File, diffID digest.Digest) error {
	if err := disk.Tree(dir).Create(diffIDName, []byte(diffID+"\n"), 0o400, false); err != nil {
		return err
	}
	// Where no seal can be made, the layer is verified again before it is mounted.
	_ = Seal(f, string(diffID))
	return nil
}

// A Layer is one that Store has stored.
type Layer struct {
	*os.File // the plain archive
	DiffID   digest.Digest
	// Verified reports whether the archive is known to have the diff ID: it is sealed.
	Verified bool
}

// Open opens the layer that is stored in a directory. One that was tampered with is ErrDataLoss, if that can be told without reading
// its archive.
func Open(dir disk.Tree, name string) (*Layer, error) {
	b, err := dir.ReadFile(name+"/"+diffIDName, maxDiffID)
	if err != nil {
		return nil, damaged(err)
	}
	text, _ := strings.CutSuffix(string(b), "\n")
	l := &Layer{DiffID: digest.Digest(text)}
	if l.DiffID.Validate() != nil || l.DiffID.Algorithm() != digest.SHA256 {
		return nil, errclass.Errorf(errdefs.ErrDataLoss, "%s of a layer is damaged: %.80q", diffIDName, text)
	}
	if l.File, err = dir.Open(name + "/" + layerName); err != nil {
		return nil, damaged(err)
	}
	sealed, err := Sealed(l.File)
	if err != nil {
		l.Close()
		return nil, err
	}
	l.Verified = sealed == text
	return l, nil
}

func damaged(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errdefs.IsFailedPrecondition(err) {
		return errclass.Errorf(errdefs.ErrDataLoss, "stored layer is damaged: %w", err)
	}
	return err
}

// AddStored adds a stored layer, and verifies and seals it first if that was not done.
func (b *Builder) AddStored(ctx context.Context, l *Layer) error {
	info, err := l.Stat()
	if err != nil {
		return err
	}
	if !l.Verified {
		if err := l.verify(ctx, info.Size()); err != nil {
			return fmt.Errorf("stored layer: %w", err)
		}
	}
	return b.AddVerified(ctx, l, info.Size(), l.DiffID)
}

func (l *Layer) verify(ctx context.Context, size int64) error {
	before, err := Identity(l.File)
	if err != nil {
		return err
	}
	hash, buffer := sha256.New(), make([]byte, bufferSize)
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := l.ReadAt(buffer, at)
		if err != nil && err != io.EOF {
			return err
		}
		if n == 0 {
			break
		}
		hash.Write(buffer[:n])
		at += int64(n)
	}
	if got := digest.NewDigest(digest.SHA256, hash); got != l.DiffID {
		return errclass.Errorf(errdefs.ErrDataLoss, "diff ID mismatch: got %s, expected %s", got, l.DiffID)
	}
	if after, err := Identity(l.File); err != nil || after != before {
		return errclass.Errorf(errdefs.ErrDataLoss, "it changes while it is verified")
	}
	l.Verified = true
	return Seal(l.File, string(l.DiffID))
}
