package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tornAge is how old must be what is torn: a writer's directory is that, too, until it has its
// files, and a file written aside is there for the time of a write and a sync.
const tornAge = time.Hour

// Torn is what a killed writer has left where no other call finds it: a directory in ingest/
// that is no ingest, or a file that was written aside.
type Torn struct {
	Path      string // relative to the root
	Size      int64  // of a file
	ChangedAt time.Time
}

// SweepTorn deletes what is torn, and calls f with each once it is gone. What changed at that
// time or later, or within the last hour, stays. With dry nothing is deleted.
func (s *Store) SweepTorn(ctx context.Context, before time.Time, dry bool, f func(Torn) error) error {
	if limit := time.Now().Add(-tornAge); limit.Before(before) {
		before = limit
	}
	for _, dir := range []string{
		"ingest",
		filepath.Join(ocispec.ImageBlobsDir, string(digest.SHA256)),
		filepath.Join(ocispec.ImageBlobsDir, string(digest.SHA512)),
	} {
		d, err := os.Open(s.file(dir))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("sweep %s: %w", dir, cause(err))
		}
		err = readNames(ctx, d, func(e fs.DirEntry) error {
			path := filepath.Join(dir, e.Name())
			var remove func(path string, dry bool) (gone bool, err error)
			switch {
			case strings.HasPrefix(e.Name(), ".tmp-") && e.Type().IsRegular():
				remove = removeAside
			case dir == "ingest" && e.IsDir() && valid(digest.SHA256, e.Name()):
				remove = removeTorn
			default:
				return nil
			}
			fi, err := e.Info()
			if err == nil && fi.ModTime().Before(before) {
				var gone bool
				if gone, err = remove(s.file(path), dry); gone {
					t := Torn{Path: path, ChangedAt: fi.ModTime()}
					if fi.Mode().IsRegular() {
						t.Size = fi.Size()
					}
					return f(t)
				}
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("sweep %s: %w", path, cause(err))
			}
			return nil
		})
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func removeAside(path string, dry bool) (gone bool, err error) {
	if !dry {
		err = os.Remove(path)
	}
	return err == nil, err
}

// removeTorn removes a directory that is no ingest and that no writer has. It isn't gone
// where it holds files that are not ours.
func removeTorn(dir string, dry bool) (gone bool, err error) {
	if _, err := readIngest(dir); !errdefs.IsNotFound(err) {
		return false, err
	}
	if dry {
		return removable(dir)
	}
	lock, err := lockIngest(context.Background(), dir, false)
	if errdefs.IsUnavailable(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if _, err := readIngest(dir); !errdefs.IsNotFound(err) { // made one meanwhile
		return false, errors.Join(err, lock.Close())
	}
	if err := removeIngest(dir, lock); err != nil {
		return false, err
	}
	_, err = os.Lstat(dir)
	return errors.Is(err, fs.ErrNotExist), nil
}

// removable tells of a directory what removing it would come to.
func removable(dir string) (bool, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if !slices.Contains(known, e.Name()) {
			return false, nil
		}
	}
	lock, err := os.Open(filepath.Join(dir, lockFile))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer lock.Close()
	return !locked(lock), nil
}
