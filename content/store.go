package content

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"distkit/disk"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const (
	emptyLayout = `{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + "\"}\n"
	emptyIndex  = `{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[]}` + "\n"
)

// Store is a content store in a directory. It holds no state but the directory's path, and
// is safe for concurrent use by goroutines and processes.
type Store struct {
	root  string
	ready atomic.Bool
}

// Open opens the store at root, which need not exist: it is created by the first write, and
// reads as empty until then. A layout version that is not known is FailedPrecondition.
func Open(root string) (*Store, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", root, err)
	}
	s := &Store{root: abs}
	b, err := os.ReadFile(s.file(ocispec.ImageLayoutFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", root, cause(err))
	}
	var layout ocispec.ImageLayout
	if err := json.Unmarshal(b, &layout); err != nil {
		return nil, errclass.As(fmt.Errorf("open store %s: parse oci-layout: %w", root, err), errdefs.ErrFailedPrecondition)
	}
	if layout.Version != ocispec.ImageLayoutVersion {
		return nil, errclass.As(fmt.Errorf("open store %s: image layout version %q is not known (only %s)",
			root, layout.Version, ocispec.ImageLayoutVersion), errdefs.ErrFailedPrecondition)
	}
	s.ready.Store(true)
	return s, nil
}

// Root is the store's directory, an absolute path.
func (s *Store) Root() string { return s.root }

func (s *Store) file(elem ...string) string {
	return filepath.Join(append([]string{s.root}, elem...)...)
}

// Init makes the root an OCI image layout unless it is one: directories, an index.json
// without names, oci-layout last. Whoever writes into the store calls it first; writers do.
func (s *Store) Init() error {
	if s.ready.Load() {
		return nil
	}
	for _, dir := range []string{s.file(ocispec.ImageBlobsDir), s.file("ingest")} {
		if err := disk.MakeDir(dir); err != nil {
			return fmt.Errorf("create store: %w", err)
		}
	}
	if err := s.publish(ocispec.ImageIndexFile, emptyIndex); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	if err := s.publish(ocispec.ImageLayoutFile, emptyLayout); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	s.ready.Store(true)
	return nil
}

// publish puts a file into the root, whole and durable, unless one of that name is there.
func (s *Store) publish(name, text string) error {
	path := s.file(name)
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	tmp, err := s.writeTemp([]byte(text))
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	err = os.Link(tmp, path)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.ENOSYS):
		err = os.Rename(tmp, path) // a file system without hard links
	}
	if err != nil {
		return err
	}
	return disk.SyncDir(s.root)
}

// writeTemp writes a file aside, synced, that is to be renamed or linked into place.
func (s *Store) writeTemp(b []byte) (path string, err error) {
	if err := disk.MakeDir(s.file("ingest")); err != nil {
		return "", err
	}
	path = s.file("ingest", tmpPrefix+strconv.FormatUint(rand.Uint64(), 36))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync())
	err = errors.Join(err, f.Close())
	if err != nil {
		_ = os.Remove(path)
	}
	return path, err
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

// blobPath is where a blob of a valid digest is or would be.
func (s *Store) blobPath(dgst digest.Digest) string {
	alg, hex, _ := split(string(dgst))
	return s.file(ocispec.ImageBlobsDir, string(alg), hex)
}

// stat finds a blob: its path and what the file system knows.
func (s *Store) stat(dgst digest.Digest) (string, fs.FileInfo, error) {
	if err := Validate(dgst); err != nil {
		return "", nil, err
	}
	path := s.blobPath(dgst)
	fi, err := os.Stat(path)
	if err != nil {
		return "", nil, blobError(dgst, err)
	}
	if !fi.Mode().IsRegular() {
		return "", nil, blobError(dgst, fs.ErrNotExist)
	}
	return path, fi, nil
}

func blobError(dgst digest.Digest, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errclass.As(fmt.Errorf("blob %s: not found", dgst), errdefs.ErrNotFound)
	}
	return fmt.Errorf("blob %s: %w", dgst, cause(err))
}

// Path is the absolute path of a blob that exists; NotFound if it doesn't.
func (s *Store) Path(dgst digest.Digest) (string, error) {
	path, _, err := s.stat(dgst)
	return path, err
}

// Info describes one blob; NotFound if there is none.
func (s *Store) Info(_ context.Context, dgst digest.Digest) (Info, error) {
	_, fi, err := s.stat(dgst)
	if err != nil {
		return Info{}, err
	}
	return s.info(dgst, fi, true)
}

func (s *Store) info(dgst digest.Digest, fi fs.FileInfo, labels bool) (Info, error) {
	info := Info{Digest: dgst, Size: fi.Size(), CreatedAt: fi.ModTime(), UpdatedAt: fi.ModTime()}
	if !labels {
		return info, nil
	}
	set, changed, err := s.readLabels(dgst)
	if err != nil {
		return Info{}, err
	}
	info.Labels = set
	if changed.After(info.UpdatedAt) {
		info.UpdatedAt = changed
	}
	return info, nil
}

// File is a blob opened for reading: a plain file, whose bytes nobody changes.
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
	f, err := os.Open(s.blobPath(dgst))
	if err != nil {
		return nil, blobError(dgst, err)
	}
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		_ = f.Close()
		if err == nil {
			err = fs.ErrNotExist
		}
		return nil, blobError(dgst, err)
	}
	return &File{f, fi.Size()}, nil
}

// ReaderAt is File, as a [Provider] gives it.
func (s *Store) ReaderAt(_ context.Context, dgst digest.Digest) (ReaderAt, error) {
	f, err := s.File(dgst)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Digests calls f with the digest of every blob, in no order and without looking at the
// blobs themselves. Memory does not grow with the store. Files whose names are no digests
// are passed over.
func (s *Store) Digests(ctx context.Context, f func(digest.Digest) error) error {
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		dir, err := os.Open(s.file(ocispec.ImageBlobsDir, string(alg)))
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
			return fmt.Errorf("list %s: %w", dir.Name(), cause(err))
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// Walk calls f with every blob, in no order. One that is deleted meanwhile is passed over.
func (s *Store) Walk(ctx context.Context, f func(Info) error) error {
	_, err := os.Stat(s.file("labels"))
	labels := err == nil
	return s.Digests(ctx, func(dgst digest.Digest) error {
		fi, err := os.Stat(s.blobPath(dgst))
		if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
			return nil
		}
		if err != nil {
			return blobError(dgst, err)
		}
		info, err := s.info(dgst, fi, labels)
		if err != nil {
			return err
		}
		return f(info)
	})
}

// Delete removes a blob and its labels; NotFound if there is none. Who has it open reads on.
func (s *Store) Delete(ctx context.Context, dgst digest.Digest) error {
	return s.DeleteBefore(ctx, dgst, time.Time{})
}

// DeleteBefore is Delete for a sweep: FailedPrecondition if the blob was stored or freshened
// at that time or later. Nobody freshens it in between.
func (s *Store) DeleteBefore(_ context.Context, dgst digest.Digest, before time.Time) error {
	unlock, err := s.lockBlob(dgst)
	if err != nil {
		return err
	}
	defer unlock()
	if !before.IsZero() {
		_, fi, err := s.stat(dgst)
		if err != nil {
			return err
		}
		if !fi.ModTime().Before(before) {
			return errclass.As(fmt.Errorf("delete %s: in use since %s", dgst, fi.ModTime().Format(time.RFC3339)), errdefs.ErrFailedPrecondition)
		}
	}
	return s.remove(dgst)
}

// remove unlinks a blob whose lock is held.
func (s *Store) remove(dgst digest.Digest) error {
	// Labels first: a crash in between leaves a blob without labels, never labels that a
	// later blob of the same bytes would inherit.
	if err := os.Remove(s.labelPath(dgst)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", dgst, err)
	}
	if err := os.Remove(s.blobPath(dgst)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return blobError(dgst, err)
		}
		return fmt.Errorf("delete %s: %w", dgst, cause(err))
	}
	events.Append(s.root, events.Event{Topic: "/content/delete", Digest: string(dgst)})
	return nil
}

// Freshen marks a blob as used now, so that a sweep beside it spares it; NotFound if there is
// none. A store that can't be written to is left as it is.
func (s *Store) Freshen(dgst digest.Digest) error {
	unlock, err := s.lockBlob(dgst)
	if err != nil {
		return err
	}
	defer unlock()
	now := time.Now()
	err = os.Chtimes(s.blobPath(dgst), now, now)
	switch {
	case err == nil, errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return nil
	}
	return blobError(dgst, err)
}
