package content

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
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
// and their directory with them. Ingests are removed in functions that are handed to alone, if it is set.
func (s *Store) SweepIngests(ctx context.Context, before time.Time, dryRun bool, alone func(func() error) error, f func(Leftover) error) error {
	aside := asideBefore(before)
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
				left, err = s.sweepIngest(ctx, name, before, dryRun, alone)
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

// asideBefore is the time before which a file must have been written so that it counts as nobody's.
func asideBefore(before time.Time) time.Time {
	if t := time.Now().Add(-tmpGrace); t.Before(before) {
		return t
	}
	return before
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
func (s *Store) sweepIngest(ctx context.Context, dir string, before time.Time, dryRun bool, alone func(func() error) error) (*Leftover, error) {
	left := &Leftover{Path: dir}
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
		return left, err
	}
	// While a large file is open its removal takes no time.
	if data, err := s.Tree.Open(path.Join(dir, dataFile)); err == nil {
		defer func() {
			_ = data.Close()
			_ = s.Tree.RemoveDir(dir) // if it is empty now: NFS keeps a file that was removed until it is closed
		}()
	}
	remove := func() error {
		lock, err := s.lockIngest(ctx, dir, false)
		if errdefs.IsUnavailable(err) {
			left = nil
			return nil
		}
		if err != nil {
			return err
		}
		if at := s.newest(dir); !at.IsZero() && !at.Before(before) {
			disk.Release(lock)
			left = nil
			return nil
		}
		return s.removeIngest(dir, lock)
	}
	if alone != nil {
		err = alone(remove)
	} else {
		err = remove()
	}
	if err != nil {
		return nil, err
	}
	return left, nil
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

// DeleteUnused is Delete for a sweep, which logs what it has deleted itself. FailedPrecondition if the blob was stored or freshened
// at the time before or later, or got labels after the time labelled, and Unavailable if somebody is working on it. Nobody freshens
// or labels it in between.
func (s *Store) DeleteUnused(dgst digest.Digest, before, labelled time.Time) error {
	lock, err := s.LockBlob(context.Background(), dgst, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("delete %s: %w", dgst, err)
	}
	if err != nil {
		return blobError(dgst, err)
	}
	defer disk.Release(lock)
	fi, err := s.stat(dgst)
	if err != nil {
		return err
	}
	used := fi.ModTime()
	if at, err := layout.Freshened(lock); err != nil {
		return fmt.Errorf("delete %s: %w", dgst, disk.Cause(err))
	} else if at.After(used) {
		used = at
	}
	if !used.Before(before) {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: in use since %s", dgst, used.Format(time.RFC3339))
	}
	if fi, err := s.Tree.Stat(labelName(dgst)); err == nil && !fi.ModTime().Before(labelled) {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: it has got labels at %s", dgst, fi.ModTime().Format(time.RFC3339))
	}
	return s.unlink(dgst)
}

// eachLabelled calls f with the digest of every file of labels, and what the file system knows of it.
func (s *Store) eachLabelled(ctx context.Context, f func(digest.Digest, fs.FileInfo) error) error {
	for alg := range hexSize {
		dir, err := s.Tree.OpenDir(path.Join("labels", string(alg)))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list labels: %w", err)
		}
		err = readNames(ctx, dir, func(e fs.DirEntry) error {
			if !e.Type().IsRegular() || !valid(alg, e.Name()) {
				return nil
			}
			dgst := digest.NewDigestFromEncoded(alg, e.Name())
			fi, err := s.Tree.Stat(labelName(dgst))
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("labels of %s: %w", dgst, disk.Cause(err))
			}
			return f(dgst, fi)
		})
		_ = dir.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// Labelled calls f with every blob that has a label, if its labels were changed after a time. Labels that are damaged count, if
// the key stands anywhere in them.
func (s *Store) Labelled(ctx context.Context, key string, since time.Time, f func(digest.Digest) error) error {
	return s.eachLabelled(ctx, func(dgst digest.Digest, fi fs.FileInfo) error {
		if fi.ModTime().Before(since) {
			return nil
		}
		b, err := s.Tree.ReadFile(labelName(dgst), maxLabels)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case errdefs.IsFailedPrecondition(err): // no file, or too large: no labels
			return nil
		case err != nil:
			return fmt.Errorf("labels of %s: %w", dgst, disk.Cause(err))
		}
		var labels map[string]json.RawMessage
		has := bytes.Contains(b, []byte(key))
		if json.Unmarshal(b, &labels) == nil {
			_, has = labels[key]
		}
		if !has {
			return nil
		}
		return f(dgst)
	})
}

// SweepLabels removes labels of no blob, older than before and an hour, which a crash left between the labels and the blob. It
// calls f with each.
func (s *Store) SweepLabels(ctx context.Context, before time.Time, dryRun bool, f func(Leftover) error) error {
	before = asideBefore(before)
	return s.eachLabelled(ctx, func(dgst digest.Digest, fi fs.FileInfo) error {
		if !fi.ModTime().Before(before) {
			return nil
		}
		if _, err := s.stat(dgst); !errdefs.IsNotFound(err) {
			return err
		}
		name := labelName(dgst)
		if !dryRun {
			if removed, err := s.removeLabels(name, before); err != nil || !removed {
				return err
			}
		}
		return f(Leftover{Path: name, Size: fi.Size(), ChangedAt: fi.ModTime()})
	})
}

// removeLabels removes a file of labels if it is older than a time. There is no blob to lock. So it is moved away first, and back if it
// turns out to be a new one, whose blob is about to come.
func (s *Store) removeLabels(name string, before time.Time) (removed bool, err error) {
	aside := layout.AsideName(layout.Ingest)
	if err := s.Tree.Rename(name, aside); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return false, err
	}
	fi, err := s.Tree.Stat(aside)
	if err == nil && !fi.ModTime().Before(before) {
		if err = s.Tree.Link(aside, name); errors.Is(err, fs.ErrExist) {
			err = nil
		}
	}
	return err == nil && fi.ModTime().Before(before), errors.Join(err, s.Tree.Remove(aside))
}
