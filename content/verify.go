package content

import (
	"context"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Verify reads a blob and hashes it again. DataLoss if it doesn't hash to its name, NotFound if it isn't stored.
func (s *Store) Verify(ctx context.Context, dgst digest.Digest) error {
	f, err := s.File(dgst)
	if err != nil {
		return err
	}
	defer f.Close()
	return verifyFile(ctx, dgst, f.File, f.Size())
}

func verifyFile(ctx context.Context, dgst digest.Digest, f *os.File, size int64) error {
	h := newHash(dgst.Algorithm())
	if err := hashRange(ctx, h, f, 0, size); err != nil {
		return fmt.Errorf("verify %s: %w", dgst, err)
	}
	if got := digest.NewDigest(dgst.Algorithm(), h); got != dgst {
		return mismatch("verify %s: digest mismatch: got %s", dgst, got)
	}
	return nil
}

// hashRange adds the bytes [from, to) of a file to a hash.
func hashRange(ctx context.Context, h hash.Hash, f *os.File, from, to int64) error {
	buf := make([]byte, chunk)
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.ReadAt(buf[:min(chunk, to-from)], from)
		h.Write(buf[:n])
		from += int64(n)
		if err != nil && (err != io.EOF || n == 0) {
			return fmt.Errorf("read stored data: %w", err)
		}
	}
	return nil
}

// DeleteCorrupt removes a blob that doesn't hash to its name, and its labels. FailedPrecondition if the blob is intact,
// or was replaced in the meantime. Hashing takes long, so it comes before taking the lock.
func (s *Store) DeleteCorrupt(ctx context.Context, dgst digest.Digest) error {
	if _, err := s.stat(dgst); err != nil {
		return s.notOwn(dgst, err)
	}
	f, err := s.Tree.Open(layout.BlobName(dgst))
	if err != nil {
		return blobError(dgst, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return blobError(dgst, err)
	}
	switch err := verifyFile(ctx, dgst, f, fi.Size()); {
	case err == nil:
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: it is not corrupt", dgst)
	case !errdefs.IsDataLoss(err):
		return err
	}
	lock, err := s.lockBlob(ctx, dgst)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	// A commit that replaces a damaged blob needs this lock, so the result stays true until remove.
	if !s.Tree.Names(layout.BlobName(dgst), f) {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: it was replaced", dgst)
	}
	return s.remove(dgst)
}

// Strays calls f with every file below blobs/ and labels/ that is not a blob, or that are labels without a blob. Paths
// are relative to the root and in no particular order.
func (s *Store) Strays(ctx context.Context, f func(path string) error) error {
	for _, top := range []string{ocispec.ImageBlobsDir, labelsDir} {
		if err := s.strays(ctx, top, "", f); err != nil {
			return err
		}
	}
	return nil
}

// maxStrayDepth bounds the depth below blobs/ and labels/ at which strays are looked for. A directory at that depth is
// reported as a whole.
const maxStrayDepth = 16

// strays is Strays for the directory alg below top, or for top itself if alg is "".
func (s *Store) strays(ctx context.Context, top, alg string, f func(path string) error) error {
	name := path.Join(top, alg)
	return s.eachEntry(ctx, name, func(e fs.DirEntry) error {
		if e.IsDir() && strings.Count(alg, "/") < maxStrayDepth {
			return s.strays(ctx, top, path.Join(alg, e.Name()), f)
		}
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), ".nfs") {
			return nil // NFS gives such a name to a file that was removed while open, and removes it when it is closed
		}
		if e.Type().IsRegular() && valid(digest.Algorithm(alg), e.Name()) {
			if top == ocispec.ImageBlobsDir {
				return nil
			}
			if _, err := s.stat(digest.Digest(alg + ":" + e.Name())); !errdefs.IsNotFound(err) {
				return err
			}
		}
		return f(path.Join(name, e.Name()))
	})
}
