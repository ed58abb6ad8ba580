package content

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Store is a content store in a directory. It holds no state but the directory's path, and
// is safe for concurrent use by goroutines and processes.
type Store struct {
	layout.Dir        // the store's own, "."
	namespace  string // that its user's root is the directory of, if any
}

// Open opens the store at root, which need not exist: it is created by the first write, and
// reads as empty until then. The directory of a namespace opens the store that it is part of;
// see [Store.Namespace]. A layout version that is not known is FailedPrecondition.
//
// Blobs of the alternates that [layout.AlternatesEnv] names are read as the store's own. They are not listed, swept, deleted
// or labelled by it.
func Open(root string) (*Store, error) {
	d, err := layout.Open(root)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", root, err)
	}
	s := &Store{Dir: layout.Dir{Tree: d.Tree, Name: ".", Alternates: d.Alternates}}
	if d.Name != "." {
		s.namespace = path.Base(d.Name)
	}
	if err := s.Check(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open store %s: %w", root, disk.Cause(err))
	}
	return s, nil
}

// Root is the store's directory, an absolute path.
func (s *Store) Root() string { return string(s.Tree) }

// Namespace is the namespace whose directory was opened in place of the store's; "" if it was
// the store's.
func (s *Store) Namespace() string { return s.namespace }

// Init makes the root an OCI image layout unless it is one: directories, an index.json
// without names, oci-layout last. Whoever writes into the store calls it first; writers do.
// FailedPrecondition if there is a layout that has lost its index.json.
func (s *Store) Init() error {
	if there, err := s.Exists(); err != nil {
		return err
	} else if there {
		return nil
	}
	for _, dir := range []string{ocispec.ImageBlobsDir, layout.Ingest} {
		if err := s.Tree.MakeDir(dir); err != nil {
			return fmt.Errorf("create store: %w", err)
		}
	}
	if err := s.Create(layout.Ingest); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	return nil
}

var hexSize = map[digest.Algorithm]int{digest.SHA256: 2 * sha256.Size, digest.SHA512: 2 * sha512.Size}

func newHash(alg digest.Algorithm) hash.Hash {
	if alg == digest.SHA512 {
		return sha512.New()
	}
	return sha256.New()
}

// Validate tells whether the store can hold a blob of this digest: InvalidArgument if it is
// malformed, NotImplemented if its algorithm is neither sha256 nor sha512.
func Validate(dgst digest.Digest) error {
	if alg, hex, ok := split(string(dgst)); ok {
		if valid(alg, hex) {
			return nil
		}
		if _, known := hexSize[alg]; !known && dgst.Validate() != digest.ErrDigestInvalidFormat {
			return errclass.As(fmt.Errorf("digest %s: algorithm %s is not supported", dgst, alg), errdefs.ErrNotImplemented)
		}
	}
	return errclass.As(fmt.Errorf("digest %q is malformed: want sha256: or sha512: and lower-case hex", string(dgst)), errdefs.ErrInvalidArgument)
}

func split(s string) (alg digest.Algorithm, hex string, ok bool) {
	for i := range len(s) {
		if s[i] == ':' {
			return digest.Algorithm(s[:i]), s[i+1:], true
		}
	}
	return "", "", false
}

func valid(alg digest.Algorithm, hex string) bool {
	if size, ok := hexSize[alg]; !ok || len(hex) != size {
		return false
	}
	for i := range len(hex) {
		if c := hex[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// stat finds a blob of the store's own: what the file system knows of it. What is no regular file is no blob.
func (s *Store) stat(dgst digest.Digest) (fs.FileInfo, error) {
	if err := Validate(dgst); err != nil {
		return nil, err
	}
	fi, err := s.Tree.Stat(layout.BlobName(dgst))
	if err == nil && !fi.Mode().IsRegular() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, blobError(dgst, err)
	}
	return fi, nil
}

func blobError(dgst digest.Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errclass.As(fmt.Errorf("blob %s: not found", dgst), errdefs.ErrNotFound)
	}
	return fmt.Errorf("blob %s: %w", dgst, disk.Cause(err))
}

// lookup finds a blob, of the store's own or of an alternate, and the tree that has it.
func (s *Store) lookup(dgst digest.Digest) (disk.Tree, fs.FileInfo, error) {
	if err := Validate(dgst); err != nil {
		return "", nil, err
	}
	tree, fi, err := s.FindBlob(dgst)
	if err != nil {
		return "", nil, blobError(dgst, err)
	}
	return tree, fi, nil
}

// Path is the absolute path of a blob that exists; NotFound if it doesn't.
func (s *Store) Path(dgst digest.Digest) (string, error) {
	tree, _, err := s.lookup(dgst)
	if err != nil {
		return "", err
	}
	return tree.Path(layout.BlobName(dgst)), nil
}

// Info describes one blob; NotFound if there is none.
func (s *Store) Info(_ context.Context, dgst digest.Digest) (Info, error) {
	tree, fi, err := s.lookup(dgst)
	if err != nil {
		return Info{}, err
	}
	return newInfo(tree, dgst, fi, true)
}

func newInfo(tree disk.Tree, dgst digest.Digest, fi fs.FileInfo, labels bool) (Info, error) {
	info := Info{Digest: dgst, Size: fi.Size(), CreatedAt: fi.ModTime(), UpdatedAt: fi.ModTime()}
	if !labels {
		return info, nil
	}
	set, changed, err := readLabels(tree, dgst)
	if err != nil {
		return Info{}, err
	}
	info.Labels = set
	if changed.After(info.UpdatedAt) {
		info.UpdatedAt = changed
	}
	return info, nil
}

// File is a blob that is open for reading. Nobody changes its bytes, and it stays readable when the blob is deleted.
type File struct {
	*os.File
	size int64
}

// Size is the blob's size in bytes.
func (f *File) Size() int64 { return f.size }

// File opens a blob; NotFound if there is none.
func (s *Store) File(dgst digest.Digest) (*File, error) {
	if err := Validate(dgst); err != nil {
		return nil, err
	}
	f, err := s.OpenBlob(dgst)
	if err != nil {
		if _, _, ferr := s.FindBlob(dgst); errors.Is(ferr, fs.ErrNotExist) {
			err = ferr // it is no regular file
		}
		return nil, blobError(dgst, err)
	}
	fi, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, blobError(dgst, err)
	}
	return &File{f, fi.Size()}, nil
}

// Digests calls f with the digest of every blob of the store's own, in no order and without looking at the
// blobs themselves. Memory does not grow with the store. Files whose names are no digests
// are passed over.
func (s *Store) Digests(ctx context.Context, f func(digest.Digest) error) error {
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		dir, err := s.Tree.OpenDir(path.Join(ocispec.ImageBlobsDir, string(alg)))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list blobs: %w", err)
		}
		err = readNames(ctx, dir, func(e fs.DirEntry) error {
			if !valid(alg, e.Name()) || e.IsDir() {
				return nil
			}
			return f(digest.Digest(string(alg) + ":" + e.Name()))
		})
		_ = dir.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func readNames(ctx context.Context, dir *os.File, f func(fs.DirEntry) error) error {
	for {
		entries, err := dir.ReadDir(512)
		for _, e := range entries {
			if err := f(e); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", dir.Name(), disk.Cause(err))
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// Walk calls f with every blob, in no order. One that is deleted meanwhile is passed over. A blob whose labels are damaged
// has none; once f has had all blobs, the first such failure is returned.
func (s *Store) Walk(ctx context.Context, f func(Info) error) error {
	return s.walk(ctx, true, f)
}

// WalkSizes is Walk without the labels of blobs, which are not read.
func (s *Store) WalkSizes(ctx context.Context, f func(Info) error) error {
	return s.walk(ctx, false, f)
}

func (s *Store) walk(ctx context.Context, labels bool, f func(Info) error) error {
	if labels {
		_, err := s.Tree.Stat("labels")
		labels = !errors.Is(err, fs.ErrNotExist)
	}
	var damaged error
	err := s.Digests(ctx, func(dgst digest.Digest) error {
		fi, err := s.stat(dgst)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := newInfo(s.Tree, dgst, fi, labels)
		if errdefs.IsDataLoss(err) {
			damaged = cmp.Or(damaged, err)
			info, err = newInfo(s.Tree, dgst, fi, false)
		}
		if err != nil {
			return err
		}
		return f(info)
	})
	return cmp.Or(err, damaged)
}

// Delete removes a blob and its labels; NotFound if there is none, FailedPrecondition if only an alternate has it. Who has
// it open reads on.
func (s *Store) Delete(ctx context.Context, dgst digest.Digest) error {
	lock, err := s.lockOwn(ctx, dgst)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	return s.remove(dgst)
}

// remove unlinks a blob whose lock is held, and logs it.
func (s *Store) remove(dgst digest.Digest) error {
	if err := s.unlink(dgst); err != nil {
		return err
	}
	events.Append(s.Root(), events.Event{Topic: "/content/delete", Digest: string(dgst)})
	return nil
}

// unlink unlinks a blob whose lock is held.
func (s *Store) unlink(dgst digest.Digest) error {
	// Labels first: a crash in between leaves a blob without labels, never labels that a
	// later blob of the same bytes would inherit.
	if err := s.Tree.Remove(labelName(dgst)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", dgst, err)
	}
	if err := s.Tree.Remove(layout.BlobName(dgst)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return blobError(dgst, err)
		}
		return fmt.Errorf("delete %s: %w", dgst, disk.Cause(err))
	}
	return nil
}

// Freshen marks a blob as used now, so that a sweep beside it spares it; NotFound if there is
// none. A store that can't be written to is left as it is, and so is an alternate.
func (s *Store) Freshen(ctx context.Context, dgst digest.Digest) error {
	if tree, _, err := s.lookup(dgst); err != nil || tree != s.Tree {
		return err
	}
	if err := s.Dir.Freshen(ctx, dgst); err != nil {
		return blobError(dgst, err)
	}
	return nil
}
