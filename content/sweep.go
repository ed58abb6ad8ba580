package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"distkit/disk"
	"distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// tmpGrace is the least age at which a file written aside counts as nobody's: it has no
	// lock, and lives for an instant.
	tmpGrace = time.Hour
)

// Leftover is what a process that died has left in ingest/, or a file that it wrote aside.
type Leftover struct {
	Ref       string // of an ingest that could be resumed
	Path      string // relative to the root
	Size      int64  // bytes stored
	ChangedAt time.Time
}

// SweepIngests removes the ingests to which nothing was added since a time and that no writer
// has open, torn ones among them, and files written aside that are older than an hour, too. It
// calls f with each once it is gone, or would be with dryRun. Files that are not known stay,
// and their directory with them.
func (s *Store) SweepIngests(ctx context.Context, before time.Time, dryRun bool, f func(Leftover) error) error {
	aside := before
	if t := time.Now().Add(-tmpGrace); t.Before(aside) {
		aside = t
	}
	for _, dir := range []string{".", layout.Ingest, path.Join(ocispec.ImageBlobsDir, string(digest.SHA256)), path.Join(ocispec.ImageBlobsDir, string(digest.SHA512))} {
		d, err := s.Tree.OpenDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("sweep ingests: %w", err)
		}
		err = readNames(ctx, d, func(e fs.DirEntry) error {
			name := path.Join(dir, e.Name())
			var left *Leftover
			var err error
			switch {
			case strings.HasPrefix(e.Name(), layout.Aside) && e.Type().IsRegular():
				left, err = s.sweepAside(name, aside, dryRun)
			case dir == layout.Ingest && e.IsDir() && valid(digest.SHA256, e.Name()):
				left, err = s.sweepIngest(ctx, name, before, dryRun)
			}
			if err != nil {
				return fmt.Errorf("sweep %s: %w", name, err)
			}
			if left == nil {
				return nil
			}
			return f(*left)
		})
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) sweepAside(name string, before time.Time, dryRun bool) (*Leftover, error) {
	fi, err := s.Tree.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.ModTime().Before(before) {
		return nil, nil
	}
	if err == nil && !dryRun {
		err = s.Tree.Remove(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return &Leftover{Path: name, Size: fi.Size(), ChangedAt: fi.ModTime()}, nil
}

// sweepIngest looks first, so that what is in use is not disturbed, and once more under the
// lock: whoever went on with the ingest in between keeps it.
func (s *Store) sweepIngest(ctx context.Context, name string, before time.Time, dryRun bool) (*Leftover, error) {
	dir := name
	left := Leftover{Path: name}
	st, err := s.readIngest(dir)
	switch {
	case err == nil && st.Active:
		return nil, nil
	case err == nil:
		left.Ref, left.Size = st.Ref, st.Offset
	case !errdefs.IsNotFound(err):
		return nil, err
	}
	var ours bool
	left.ChangedAt, ours, err = s.lastChange(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (!ours || !left.ChangedAt.Before(before)) {
		return nil, nil
	}
	if err != nil || dryRun {
		return &left, err
	}
	lock, err := s.lockIngest(ctx, dir, false)
	if errdefs.IsUnavailable(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if at := s.newest(dir); !at.IsZero() && !at.Before(before) {
		disk.Release(lock)
		return nil, nil
	}
	if err := s.removeIngest(dir, lock); err != nil {
		return nil, err
	}
	return &left, nil
}

// lastChange tells when something was last done to an ingest. It is not ours to remove if it
// holds files that are not known and no others.
func (s *Store) lastChange(dir string) (at time.Time, ours bool, err error) {
	if at = s.newest(dir); !at.IsZero() {
		return at, true, nil
	}
	d, err := s.Tree.OpenDir(dir)
	if err != nil {
		return at, false, err
	}
	defer d.Close()
	fi, err := d.Stat()
	if err != nil {
		return at, false, err
	}
	ours = true
	err = readNames(context.Background(), d, func(e fs.DirEntry) error {
		if e.Name() == lockFile {
			ours = true
			return fs.SkipAll
		}
		ours = false
		return nil
	})
	if errors.Is(err, fs.SkipAll) {
		err = nil
	}
	return fi.ModTime(), ours, err
}

// newest is the latest time at which one of an ingest's files was written, zero if there is
// none but the lock, which is made by whoever looks.
func (s *Store) newest(dir string) (at time.Time) {
	for _, name := range known {
		if fi, err := s.Tree.Stat(path.Join(dir, name)); err == nil && name != lockFile && fi.ModTime().After(at) {
			at = fi.ModTime()
		}
	}
	return at
}
