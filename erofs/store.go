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

// Names of the files of a stored layer.
const (
	layerName  = "layer.tar" // the plain archive
	diffIDName = "diffid"    // the archive's digest and a newline
	maxDiffID  = 256
)

// StoreOptions are the options of Store. The zero value is the default.
type StoreOptions struct {
	ExpectDiffID digest.Digest // the diff ID that the layer must have, if not empty
	// MaxBytes bounds the bytes of the plain archive and those of its sparse files including holes. MaxEntries bounds
	// its entries. 0 means no bound.
	MaxBytes, MaxEntries int64
	Turn                 layer.Turn // as for layer.NewReaderInTurn; may be nil
}

// Stored is the result of Store.
type Stored struct {
	DiffID  digest.Digest `json:"diffID"`
	Size    int64         `json:"size"` // bytes of the plain archive
	Entries int64         `json:"entries"`
}

// Store writes the layer in r to an empty directory: its plain archive and its diff ID. The layer is plain or
// compressed with gzip or zstd. Its entries are parsed, to check that it is a valid archive, but not applied. The
// errors are those of Builder.Add. After an error the directory is empty. Store does not sync the files to disk.
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

// StorePlain stores a plain archive without parsing its entries. It is for archives that the caller has made itself.
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

// done closes the archive, and deletes it if storing it failed.
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
	// Without a seal, the layer is verified again before it is mounted.
	_ = Seal(f, string(diffID))
	return nil
}

// A Layer is a layer stored by Store.
type Layer struct {
	*os.File // the plain archive
	DiffID   digest.Digest
	// Verified reports whether the archive has a seal, and so is known to have the diff ID.
	Verified bool
}

// Open opens the layer stored in a directory. ErrDataLoss: its files are not as Store writes them, as far as can be
// seen without reading the archive.
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

// AddStored adds a stored layer. If the layer has no seal, AddStored verifies it first and seals it.
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
