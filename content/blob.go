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

// Info describes a blob at rest.
type Info struct {
	Digest    digest.Digest
	Size      int64
	CreatedAt time.Time // stored, or freshened by an ingest that found it there
	UpdatedAt time.Time // that, or the last change of its labels
	Labels    map[string]string
}

// Field gives the fields that containerd's filters know: digest, size, labels.KEY.
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

// own is the store without its alternates.
func (s *Store) own() *Store { return &Store{Dir: layout.Dir{Tree: s.Tree, Name: s.Name}} }

// stat describes the file of a blob that is in the store itself, not in an alternate.
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

// lookup returns the tree that has a blob, the store's own before those of alternates, and what the file system knows of the blob.
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

// Size is the size of a blob in bytes; NotFound if there is none.
func (s *Store) Size(dgst digest.Digest) (int64, error) {
	_, fi, err := s.lookup(dgst)
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// Info describes one blob; NotFound if there is none, DataLoss if its labels are damaged.
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

// Digests calls f with the digest of every blob of the store's own, in no order. It does not look at the blobs themselves, and
// passes over files whose names are no digests. Memory does not grow with the store.
func (s *Store) Digests(ctx context.Context, f func(digest.Digest) error) error {
	return s.digestsIn(ctx, func(_ *os.File, dgst digest.Digest) error { return f(dgst) })
}

// digestsIn is Digests, and calls f with the open directory of the blob too.
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

// anySize is the size of a blob whose size is not known.
const anySize = -1

// stored reports whether the store, or an alternate, has a blob. A blob of another size is damaged, and does not count. Callers may
// rely on a blob that is reported: it has been freshened, and is on disk.
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
		return false, nil // deleted in between
	}
	if err != nil {
		return false, blobError(dgst, err)
	}
	return true, nil
}

// maxDoubt is how many bytes larger than expected a blob may be and still be hashed, to find out whether it or the expected size
// is wrong.
const maxDoubt = 1 << 30

// checkSize returns DataLoss if the blob is stored and right, and its size is not the expected one. A blob that is larger by more
// than maxDoubt counts as damaged.
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
		err = mismatch("blob %s: size mismatch: stored are %d bytes, expected %d", dgst, f.Size(), size)
	}
	return err
}

func errExists(dgst digest.Digest) error {
	return errclass.Errorf(errdefs.ErrAlreadyExists, "blob %s: already exists", dgst)
}

// Delete removes a blob and its labels; NotFound if there is none, FailedPrecondition if only an alternate has it. Processes
// that have it open can read on.
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
	if err := s.dropLabels(dgst); err != nil && !errors.Is(err, unix.ENOTEMPTY) { // a directory with files in it is not ours
		return fmt.Errorf("delete %s: %w", dgst, err)
	}
	return s.unlinkBare(dgst)
}

// unlinkBare is unlink for a blob without labels.
func (s *Store) unlinkBare(dgst digest.Digest) error {
	if err := s.Tree.Remove(layout.BlobName(dgst)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return blobError(dgst, err)
		}
		return fmt.Errorf("delete %s: %w", dgst, disk.Cause(err))
	}
	return nil
}
