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

// tmpGrace is the age at which a file that was written aside, which has no lock, counts as left by a crash.
const tmpGrace = time.Hour

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
// and their directory with them. If alone is set, it is called to run each removal of an ingest.
func (s *Store) SweepIngests(ctx context.Context, before time.Time, dryRun bool, alone func(func() error) error, f func(Leftover) error) error {
	aside := asideBefore(before)
	for _, dir := range []string{".", layout.Ingest, path.Join(ocispec.ImageBlobsDir, string(digest.SHA256)), path.Join(ocispec.ImageBlobsDir, string(digest.SHA512))} {
		err := s.eachEntry(ctx, dir, func(e fs.DirEntry) error {
			name := path.Join(dir, e.Name())
			var left *Leftover
			var err error
			switch {
			case strings.HasPrefix(e.Name(), layout.TempPrefix) && e.Type().IsRegular():
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
		if err != nil {
			return err
		}
	}
	return nil
}

// asideBefore returns the time before which a file without a lock must have been written to count as left by a crash.
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

// sweepIngest looks at the times first, so that an ingest in use is not disturbed, and once more under the lock: whoever has
// resumed the ingest in between keeps it.
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
	// To remove a large file takes no time while it is open.
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
		if at := s.lastWrite(dir); !at.IsZero() && !at.Before(before) {
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

// lastChange returns when something was last done to an ingest. ours is false if its directory holds only unknown files.
func (s *Store) lastChange(ctx context.Context, dir string) (at time.Time, ours bool, err error) {
	if at = s.lastWrite(dir); !at.IsZero() {
		return at, true, nil
	}
	fi, err := s.Tree.Stat(dir)
	if err != nil {
		return at, false, err
	}
	if _, err := s.Tree.Stat(path.Join(dir, lockFile)); err == nil {
		return fi.ModTime(), true, nil
	}
	ours = true
	err = s.eachEntry(ctx, dir, func(fs.DirEntry) error { ours = false; return nil })
	return fi.ModTime(), ours, err
}

// lastWrite returns the latest time at which one of an ingest's files was written. The lock does not count, since a sweep creates it
// too. The time is zero if there is no other file.
func (s *Store) lastWrite(dir string) (at time.Time) {
	for _, name := range ingestFiles {
		if fi, err := s.Tree.Stat(path.Join(dir, name)); err == nil && name != lockFile && fi.ModTime().After(at) {
			at = fi.ModTime()
		}
	}
	return at
}

// Unused deletes blobs for a sweep. It writes no events: the sweep does. It holds one lock at a time, until it is asked to delete a
// blob of another lock, or closed. So blobs that share a lock cost one if they are deleted in the order of their digests.
type Unused struct {
	s                *Store
	before, labelled time.Time
	name             string // of the lock
	lock             *os.File
	freshened        time.Time // when all blobs of the lock were
}

// Unused returns an Unused. It deletes only blobs that were last stored or freshened before the time before, and whose labels have
// not changed since the time labelled.
func (s *Store) Unused(before, labelled time.Time) *Unused {
	return &Unused{s: s, before: before, labelled: labelled}
}

// Close gives the lock back.
func (u *Unused) Close() {
	if u.lock != nil {
		disk.Release(u.lock)
		u.lock = nil
	}
}

// Delete deletes a blob. NotFound if there is none, FailedPrecondition if it has been used, or has got labels, since the times given
// to [Store.Unused], and Unavailable if another process has its lock. Nobody freshens or labels it in between.
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
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: in use since %s", dgst, used.Format(time.RFC3339))
	}
	fi, err = u.s.Tree.Stat(labelName(dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return u.s.unlinkBare(dgst)
	}
	if err == nil && !fi.ModTime().Before(u.labelled) {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "delete %s: it has got labels at %s", dgst, fi.ModTime().Format(time.RFC3339))
	}
	return u.s.unlink(dgst)
}

// take takes the lock of a blob, unless it has it.
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

// SweepLabels removes labels that belong to no blob, if they are older than before and an hour: a crash can leave labels whose blob
// was not published. It calls f with each.
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
	aside := layout.TempName(layout.Ingest)
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
