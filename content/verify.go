package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Verify reads a blob and hashes it again: DataLoss if it does not hash to its name, NotFound
// if there is none.
func (s *Store) Verify(ctx context.Context, dgst digest.Digest) error {
	f, err := s.File(dgst)
	if err != nil {
		return err
	}
	defer f.Close()
	h := newHash(dgst.Algorithm())
	if err := hashRange(ctx, h, f.File, 0, f.Size()); err != nil {
		return fmt.Errorf("verify %s: %w", dgst, err)
	}
	if got := digest.NewDigest(dgst.Algorithm(), h); got != dgst {
		return mismatch(fmt.Errorf("verify %s: digest mismatch: got %s", dgst, got))
	}
	return nil
}

// DeleteCorrupt removes a blob that does not hash to its name, and its labels, after it has
// verified it once more under its lock: FailedPrecondition if it is right, because somebody
// has replaced it in between.
func (s *Store) DeleteCorrupt(ctx context.Context, dgst digest.Digest) error {
	unlock, err := s.lockBlob(dgst)
	if err != nil {
		return err
	}
	defer unlock()
	switch err := s.Verify(ctx, dgst); {
	case err == nil:
		return errclass.As(fmt.Errorf("delete %s: it is not corrupt", dgst), errdefs.ErrFailedPrecondition)
	case !errdefs.IsDataLoss(err):
		return err
	}
	return s.remove(dgst)
}

// Strays calls f with the path, relative to the root, of every file below blobs/ and labels/
// that is no blob, or belongs to none.
func (s *Store) Strays(ctx context.Context, f func(path string) error) error {
	for _, top := range []string{ocispec.ImageBlobsDir, "labels"} {
		err := filepath.WalkDir(s.file(top)+"/", func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil {
				err = ctx.Err()
			}
			if err != nil || e.IsDir() {
				return err
			}
			alg, hex := filepath.Base(filepath.Dir(path)), e.Name()
			if filepath.Dir(filepath.Dir(path)) == s.file(top) && valid(digest.Algorithm(alg), hex) {
				if top == ocispec.ImageBlobsDir {
					return nil
				}
				if _, err := os.Stat(s.blobPath(digest.Digest(alg + ":" + hex))); !errors.Is(err, fs.ErrNotExist) {
					return nil
				}
			}
			rel, err := filepath.Rel(s.root, path)
			if err != nil {
				return err
			}
			return f(rel)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
