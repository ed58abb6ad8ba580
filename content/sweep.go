package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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

// tmpGrace is the age from which a temporary file, which has no lock, counts as left behind by a crash.
const tmpGrace = time.Hour

// Leftover describes an ingest, a temporary file or a file of labels that a crash left behind.
type Leftover struct {
	Ref       string // of an ingest that could be resumed, else ""
	Path      string // relative to the store's root
	Size      int64  // number of bytes stored
	ChangedAt time.Time
}

// SweepIngests removes ingests, complete or torn, that have no writer and were last written before the given time, and
// temporary files that are also older than an hour. It calls f with each after its removal; with dryRun it removes
// nothing. Unknown files stay, and so do their directories. If alone is not nil, each removal of an ingest runs as
// alone(removal).
func (s *Store) SweepIngests(ctx context.Context, before time.Time, dryRun bool, alone func(func() error) error, f func(Leftover) error) error {
	tempBefore := tempCutoff(before)
	for _, dir := range []string{".", layout.Ingest, path.Join(ocispec.ImageBlobsDir, string(digest.SHA256)), path.Join(ocispec.ImageBlobsDir, string(digest.SHA512))} {
		err := s.eachEntry(ctx, dir, func(e fs.DirEntry) error {
			name := path.Join(dir, e.Name())
			var left *Leftover
			var err error
			switch {
			case strings.HasPrefix(e.Name(), layout.TempPrefix) && e.Type().IsRegular():
				left, err = s.sweepTemp(name, tempBefore, dryRun)
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
		if err != nil {
			return err
		}
	}
	return nil
}

// tempCutoff returns the time before which a temporary file must have been written to count as left behind by a crash:
// before the given time, and more than tmpGrace ago.
func tempCutoff(before time.Time) time.Time {
	if t := time.Now().Add(-tmpGrace); t.Before(before) {
		return t
	}
	return before
}

func (s *Store) sweepTemp(name string, before time.Time, dryRun bool) (*Leftover, error) {
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

// sweepIngest checks the times before it takes the lock, so that it doesn't disturb an ingest in use. It checks them
// again under the lock, in case the ingest was resumed in between.
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
	left.ChangedAt, ours, err = s.lastChange(ctx, dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (!ours || !left.ChangedAt.Before(before)) {
		return nil, nil
	}
	if err != nil || dryRun {
		return left, err
	}
	// Removing a large file is quick while it is open: its blocks are freed when it is closed, outside alone.
	if data, err := s.Tree.Open(path.Join(dir, dataFile)); err == nil {
		defer func() {
			_ = data.Close()
			_ = s.Tree.RemoveDir(dir) // NFS keeps a removed file in its directory until it is closed
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
		if changed := s.lastWrite(dir); !changed.IsZero() && !changed.Before(before) {
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

// lastChange returns when an ingest was last changed. ours is false if its directory has only unknown files.
func (s *Store) lastChange(ctx context.Context, dir string) (changed time.Time, ours bool, err error) {
	if changed = s.lastWrite(dir); !changed.IsZero() {
		return changed, true, nil
	}
	fi, err := s.Tree.Stat(dir)
	if err != nil {
		return changed, false, err
	}
	if _, err := s.Tree.Stat(path.Join(dir, lockFile)); err == nil {
		return fi.ModTime(), true, nil
	}
	ours = true
	err = s.eachEntry(ctx, dir, func(fs.DirEntry) error { ours = false; return nil })
	return fi.ModTime(), ours, err
}

// lastWrite returns the latest time at which a file of an ingest was written. The lock doesn't count, because a sweep
// creates it too. The time is zero if there is no other file.
func (s *Store) lastWrite(dir string) (latest time.Time) {
	for _, name := range ingestFiles {
		if fi, err := s.Tree.Stat(path.Join(dir, name)); err == nil && name != lockFile && fi.ModTime().After(latest) {
			latest = fi.ModTime()
		}
	}
	return latest
}

// Unused deletes blobs for a sweep. It writes no events; the sweep does. It keeps the lock of the last deleted blob
// until it needs another one or is closed. Blobs whose digests begin alike share a lock, so deleting in the order of
// digests takes each lock once.
type Unused struct {
	s                *Store
	before, labelled time.Time
	name             string // of the lock that is held
	lock             *os.File
	freshened        time.Time // when all blobs that share the lock were freshened
}

// Unused returns an [Unused] that deletes only blobs that were last stored or freshened before the time before, and
// whose labels last changed before the time labelled.
func (s *Store) Unused(before, labelled time.Time) *Unused {
	return &Unused{s: s, before: before, labelled: labelled}
}

// Close releases the lock.
func (u *Unused) Close() {
	if u.lock != nil {
		disk.Release(u.lock)
		u.lock = nil
	}
}

// Delete deletes a blob. NotFound if it isn't stored, Unavailable if another process has its lock, FailedPrecondition
// if it was used or labelled since the times given to [Store.Unused].
func (u *Unused) Delete(dgst digest.Digest) error {
	if err := Validate(dgst); err != nil {
		return err
	}
	if err := u.take(dgst); err != nil {
		return err
	}
	fi, err := u.s.stat(dgst)
	if err != nil {
		return err
	}
	used := fi.ModTime()
	if u.freshened.After(used) {
		used = u.freshened
	}
	if !used.Before(u.before) {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: used at %s", dgst, used.Format(time.RFC3339))
	}
	fi, err = u.s.Tree.Stat(labelName(dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return u.s.unlinkBare(dgst)
	}
	if err == nil && !fi.ModTime().Before(u.labelled) {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: labelled at %s", dgst, fi.ModTime().Format(time.RFC3339))
	}
	return u.s.unlink(dgst)
}

// take locks a blob, unless its lock is held already.
func (u *Unused) take(dgst digest.Digest) error {
	name := layout.LockName(dgst)
	if u.lock != nil && u.name == name {
		return nil
	}
	u.Close()
	lock, err := u.s.LockBlob(context.Background(), dgst, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("delete %s: %w", dgst, err)
	}
	if err != nil {
		return blobError(dgst, err)
	}
	u.name, u.lock = name, lock
	if u.freshened, err = layout.Freshened(lock); err != nil {
		u.Close()
		return fmt.Errorf("delete %s: %w", dgst, disk.Cause(err))
	}
	return nil
}

// SweepLabels removes labels without a blob that were written before the given time and more than an hour ago: a crash
// can leave labels whose blob was never published. It calls f with each.
func (s *Store) SweepLabels(ctx context.Context, before time.Time, dryRun bool, f func(Leftover) error) error {
	before = tempCutoff(before)
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

// removeLabels removes a file of labels that was written before the given time. There is no blob to lock, so it first
// moves the file away, and moves it back if it is a new one, whose blob is about to be published.
func (s *Store) removeLabels(name string, before time.Time) (removed bool, err error) {
	temp := layout.TempName(layout.Ingest)
	if err := s.Tree.Rename(name, temp); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return false, err
	}
	fi, err := s.Tree.Stat(temp)
	if err == nil && !fi.ModTime().Before(before) {
		if err = s.Tree.Link(temp, name); errors.Is(err, fs.ErrExist) {
			err = nil
		}
	}
	return err == nil && fi.ModTime().Before(before), errors.Join(err, s.Tree.Remove(temp))
}
