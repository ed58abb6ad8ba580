package content

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Info describes a stored blob.
type Info struct {
	Digest    digest.Digest
	Size      int64
	CreatedAt time.Time // when it was stored, or last freshened
	UpdatedAt time.Time // CreatedAt, or the last change of its labels if that is later
	Labels    map[string]string
}

// Field returns a field for containerd's filters: digest, size or labels.KEY.
func (i Info) Field(fieldpath []string) (value string, present bool) {
	switch {
	case len(fieldpath) == 1 && fieldpath[0] == "digest":
		return string(i.Digest), true
	case len(fieldpath) == 1 && fieldpath[0] == "size":
		return strconv.FormatInt(i.Size, 10), true
	case len(fieldpath) > 1 && fieldpath[0] == "labels":
		value, present = i.Labels[strings.Join(fieldpath[1:], ".")]
	}
	return value, present
}

// own returns the store without its alternates.
func (s *Store) own() *Store { return &Store{Dir: layout.Dir{Tree: s.Tree, Name: s.Name}} }

// stat describes the file of a blob in the store itself; alternates are ignored.
func (s *Store) stat(dgst digest.Digest) (fs.FileInfo, error) {
	_, fi, err := s.own().lookup(dgst)
	return fi, err
}

func blobError(dgst digest.Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errclass.Errorf(errdefs.ErrNotFound, "blob %s: not found", dgst)
	}
	return fmt.Errorf("blob %s: %w", dgst, disk.Cause(err))
}

// lookup returns the tree that has a blob, the store's own before its alternates, and the attributes of the blob's
// file.
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

// Path returns the absolute path of a blob; NotFound if the blob isn't stored.
func (s *Store) Path(dgst digest.Digest) (string, error) {
	tree, _, err := s.lookup(dgst)
	if err != nil {
		return "", err
	}
	return tree.Path(layout.BlobName(dgst)), nil
}

// Size returns the size of a blob in bytes; NotFound if the blob isn't stored.
func (s *Store) Size(dgst digest.Digest) (int64, error) {
	_, fi, err := s.lookup(dgst)
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// Info describes a blob; NotFound if it isn't stored, DataLoss if its labels are damaged.
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

// File is a blob that is open for reading. Its bytes never change, and it stays readable after the blob is deleted.
type File struct {
	*os.File
	size int64
}

// Size returns the blob's size in bytes.
func (f *File) Size() int64 { return f.size }

// File opens a blob; NotFound if it isn't stored.
func (s *Store) File(dgst digest.Digest) (*File, error) {
	if err := Validate(dgst); err != nil {
		return nil, err
	}
	f, err := s.OpenBlob(dgst)
	if err != nil {
		if _, _, ferr := s.FindBlob(dgst); errors.Is(ferr, fs.ErrNotExist) {
			err = ferr // something else than a regular file has the blob's name
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

// Digests calls f with the digest of every blob in the store itself, in no particular order. It skips files whose names
// are not digests, and doesn't read the blobs' attributes. Memory does not grow with the store.
func (s *Store) Digests(ctx context.Context, f func(digest.Digest) error) error {
	return s.digestsIn(ctx, func(_ *os.File, dgst digest.Digest) error { return f(dgst) })
}

// digestsIn is Digests with a function that also gets the open directory of the blob.
func (s *Store) digestsIn(ctx context.Context, f func(*os.File, digest.Digest) error) error {
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		err := s.eachEntryIn(ctx, path.Join(ocispec.ImageBlobsDir, string(alg)), func(dir *os.File, e fs.DirEntry) error {
			if !valid(alg, e.Name()) || e.IsDir() {
				return nil
			}
			return f(dir, digest.Digest(string(alg)+":"+e.Name()))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Walk calls f with every blob in the store itself, in no particular order. It skips a blob that is deleted in the
// meantime. If the labels of a blob are damaged, f gets the blob without labels, and Walk goes on; it returns the first
// such error at the end.
func (s *Store) Walk(ctx context.Context, f func(Info) error) error {
	return s.walk(ctx, true, f)
}

// WalkSizes is Walk without labels, which it doesn't read.
func (s *Store) WalkSizes(ctx context.Context, f func(Info) error) error {
	return s.walk(ctx, false, f)
}

func (s *Store) walk(ctx context.Context, labels bool, f func(Info) error) error {
	if labels {
		_, err := s.Tree.Stat(labelsDir)
		labels = !errors.Is(err, fs.ErrNotExist)
	}
	var damaged error
	err := s.digestsIn(ctx, func(dir *os.File, dgst digest.Digest) error {
		fi, err := disk.StatAt(dir, dgst.Encoded())
		if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
			return nil
		}
		if err != nil {
			return blobError(dgst, err)
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

// Freshen marks a blob as used now, so that a concurrent sweep spares it; NotFound if the blob isn't stored. It does
// nothing in a store that this user can't write to, or if only an alternate has the blob.
func (s *Store) Freshen(ctx context.Context, dgst digest.Digest) error {
	if tree, _, err := s.lookup(dgst); err != nil || tree != s.Tree {
		return err
	}
	if err := s.Dir.Freshen(ctx, dgst); err != nil {
		return blobError(dgst, err)
	}
	return nil
}

// anySize stands for an unknown size.
const anySize = -1

// stored reports whether the store, or an alternate, has a blob. A blob of another size is damaged and doesn't count.
// If the result is true the blob is durable and has been freshened, so the caller may rely on it.
func (s *Store) stored(ctx context.Context, dgst digest.Digest, size int64) (bool, error) {
	if dgst == "" {
		return false, nil
	}
	tree, fi, err := s.lookup(dgst)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, err
	case size != anySize && fi.Size() != size:
		return false, nil
	case tree != s.Tree:
		return true, nil
	}
	err = s.Retain(ctx, dgst)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // deleted since lookup
	}
	if err != nil {
		return false, blobError(dgst, err)
	}
	return true, nil
}

// maxDoubt bounds the blobs that checkSize hashes: by how many bytes they may be larger than expected.
const maxDoubt = 1 << 30

// checkSize returns DataLoss if a blob is stored with another size than expected, but its digest is right: then the
// expected size is wrong. A blob that is larger by more than maxDoubt counts as damaged, without hashing it.
func (s *Store) checkSize(ctx context.Context, dgst digest.Digest, size int64) error {
	if dgst == "" || size == anySize {
		return nil
	}
	f, err := s.File(dgst)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Size() == size || f.Size()-size > maxDoubt {
		return nil
	}
	err = verifyFile(ctx, dgst, f.File, f.Size())
	if errdefs.IsDataLoss(err) {
		return nil
	}
	if err == nil {
		err = mismatch("blob %s: size mismatch: %d bytes are stored, expected %d", dgst, f.Size(), size)
	}
	return err
}

func errExists(dgst digest.Digest) error {
	return errclass.Errorf(errdefs.ErrAlreadyExists, "blob %s: already exists", dgst)
}

// Delete removes a blob and its labels; NotFound if the blob isn't stored, FailedPrecondition if only an alternate has
// it. Processes that have the blob open can go on reading it.
func (s *Store) Delete(ctx context.Context, dgst digest.Digest) error {
	lock, err := s.lockOwn(ctx, dgst)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	return s.remove(dgst)
}

// remove deletes a blob and logs the deletion. The caller holds the blob's lock.
func (s *Store) remove(dgst digest.Digest) error {
	if err := s.unlink(dgst); err != nil {
		return err
	}
	events.Append(s.Root(), events.Event{Topic: "/content/delete", Digest: string(dgst)})
	return nil
}

// unlink deletes a blob and its labels. The caller holds the blob's lock.
func (s *Store) unlink(dgst digest.Digest) error {
	// Labels go first. A crash in between leaves a blob without labels, but never labels that a later blob with the
	// same bytes would inherit.
	if err := s.dropLabels(dgst); err != nil && !errors.Is(err, unix.ENOTEMPTY) { // ENOTEMPTY: a directory that others made in the place of the labels stays
		return fmt.Errorf("delete %s: %w", dgst, err)
	}
	return s.unlinkBare(dgst)
}

// unlinkBare deletes a blob that has no labels. The caller holds the blob's lock.
func (s *Store) unlinkBare(dgst digest.Digest) error {
	if err := s.Tree.Remove(layout.BlobName(dgst)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return blobError(dgst, err)
		}
		return fmt.Errorf("delete %s: %w", dgst, disk.Cause(err))
	}
	return nil
}
