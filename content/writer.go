package content

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Writer is an open, locked ingest. It is not safe for concurrent use.
type Writer struct {
	s        *Store
	dir      string
	lock     *os.File
	data     *os.File
	linked   *os.File // another store's blob, hard-linked instead of copied to data; nil if there is none
	ref      string
	expected digest.Digest
	total    int64
	offset   int64
	saved    int64 // the offset of the saved hash state
	begun    int64 // the offset up to which write-back has begun
	alg      digest.Algorithm
	hash     hash.Hash
	started  time.Time
	updated  time.Time
}

// A WriterOption modifies how [Store.Writer] opens an ingest.
type WriterOption int

// Wait makes Writer wait for another writer of the same ingest until ctx is done. That writer has mostly stored the
// blob by then, so that the result is AlreadyExists.
const Wait WriterOption = 1

// Writer locks an ingest and opens or resumes it, in one atomic step. If a digest is expected the ingest is that of the
// digest, whatever the ref, so that two processes don't store the same blob; else it is that of the ref. The ref is
// shown by [Store.Status]. Commit verifies the digest, and the size if it is above 0.
//
// AlreadyExists: the expected blob is stored, and was freshened; a blob of another size is damaged, and counts as
// missing. DataLoss: the blob is stored and intact, so the expected size is wrong. Unavailable: another process writes
// the ingest. InvalidArgument: the ref is empty, longer than 4 KiB, not UTF-8 or has control characters.
func (s *Store) Writer(ctx context.Context, ref string, size int64, expected digest.Digest, options ...WriterOption) (*Writer, error) {
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	dir := ingestDir(ref)
	if expected != "" {
		if err := Validate(expected); err != nil {
			return nil, err
		}
		dir = ingestDir(string(expected))
	}
	if size <= 0 {
		size = anySize
	}
	found, err := s.stored(ctx, expected, size)
	if err != nil {
		return nil, err
	}
	if found {
		s.reap(ctx, dir)
		return nil, errExists(expected)
	}
	if err := s.checkSize(ctx, expected, size); err != nil {
		return nil, err
	}
	if err := s.Init(); err != nil {
		return nil, err
	}
	lock, err := s.lockIngest(ctx, dir, slices.Contains(options, Wait))
	if err != nil {
		return nil, fmt.Errorf("ingest %s: %w", ref, err)
	}
	// The writer that this one waited for may have stored the blob.
	if found, err = s.stored(ctx, expected, size); err != nil || found {
		_ = s.removeIngest(dir, lock)
		return nil, cmp.Or(err, errExists(expected))
	}
	w := &Writer{s: s, dir: dir, lock: lock, ref: ref, total: max(size, 0), expected: expected}
	if err := w.open(ctx); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("ingest %s: %w", ref, err)
	}
	return w, nil
}

// file returns the name, relative to the store, of one of the ingest's files.
func (w *Writer) file(name string) string { return path.Join(w.dir, name) }

// write replaces one of the ingest's small files. If the name is taken by something else than a regular file, that is
// removed.
func (w *Writer) write(name, text string) error {
	err := w.s.Tree.WriteFile(w.file(name), []byte(text), 0o666)
	if errdefs.IsFailedPrecondition(err) {
		if err = w.s.Tree.Remove(w.file(name)); err == nil {
			err = w.s.Tree.WriteFile(w.file(name), []byte(text), 0o666)
		}
	}
	return err
}

// open opens or resumes the ingest, whose lock is held. What it finds may be torn or damaged; what can't be trusted is
// thrown away.
func (w *Writer) open(ctx context.Context) error {
	tree := w.s.Tree
	data, err := tree.OpenFile(w.file(dataFile), os.O_RDWR|os.O_CREATE, 0o666)
	if errors.Is(err, fs.ErrPermission) {
		// A crash during a commit left the data read-only.
		if read, rerr := tree.Open(w.file(dataFile)); rerr == nil {
			if read.Chmod(0o644) == nil {
				data, err = tree.OpenFile(w.file(dataFile), os.O_RDWR, 0)
			}
			_ = read.Close()
		}
	}
	if errdefs.IsFailedPrecondition(err) { // not a regular file
		if err = tree.Remove(w.file(dataFile)); err == nil {
			data, err = tree.OpenFile(w.file(dataFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		}
	}
	if err != nil {
		return err
	}
	w.data = data
	// This lock excludes no writer. It shows processes that list ingests that this one is active, without their
	// touching the lock that excludes writers.
	if err := disk.LockContext(ctx, data, unix.LOCK_EX); err != nil {
		w.data = nil
		return err
	}
	fi, err := data.Stat()
	if err != nil {
		return err
	}
	old, err := w.s.readIngest(w.dir)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	// The size given by the earlier writer must match only if both writers gave one.
	resumed := err == nil && (old.Total == 0 || w.total == 0 || old.Total == w.total)
	w.started = time.Now()
	if resumed {
		w.started = old.StartedAt
	}
	described := resumed && old.Ref == w.ref && old.Total == w.total && old.Expected == w.expected
	w.alg = digest.SHA256
	if w.expected != "" {
		w.alg = w.expected.Algorithm()
	}
	w.offset, w.updated = fi.Size(), fi.ModTime()
	if resumed = resumed && w.offset > 0 && (w.total == 0 || w.offset <= w.total); resumed {
		if resumed, err = w.restoreHash(ctx); err != nil {
			return err
		}
	}
	if !resumed {
		if err := w.Truncate(0); err != nil {
			return err
		}
	}
	if described {
		err = tree.Touch(w.file(refFile), time.Now()) // shows a sweep that the ingest was resumed, even if no data arrives
	} else {
		err = w.describe()
	}
	if err != nil {
		return err
	}
	if !resumed && w.expected == "" {
		w.saveState() // with the boot ID, without which restoreHash wouldn't trust the data
	}
	return nil
}

// describe writes the small files that describe the ingest.
func (w *Writer) describe() error {
	for _, f := range []struct{ name, text string }{
		{startedFile, w.started.Format(time.RFC3339Nano)},
		{totalFile, strconv.FormatInt(w.total, 10)},
		{expectedFile, string(w.expected)},
		{refFile, w.ref},
	} {
		if f.text == "" || f.text == "0" {
			if err := w.s.discard(w.file(f.name)); err != nil {
				return err
			}
			continue
		}
		if err := w.write(f.name, f.text+"\n"); err != nil {
			return err
		}
	}
	return nil
}

var errClosed = errclass.Errorf(errdefs.ErrFailedPrecondition, "writer is closed")

// writebackEvery is the number of bytes after which the kernel is told to write them to disk. The disk then works while
// more data arrives, and the sync at the end has little left to do.
const writebackEvery = 8 << 20

// Write appends p. DataLoss, without storing anything, if that would exceed the expected size.
func (w *Writer) Write(p []byte) (int, error) {
	if w.data == nil {
		return 0, errClosed
	}
	if w.linked != nil {
		return 0, errclass.Errorf(errdefs.ErrFailedPrecondition, "ingest %s: can't append to a hard link", w.ref)
	}
	if err := w.fits(int64(len(p))); err != nil {
		return 0, err
	}
	n, err := w.data.WriteAt(p, w.offset)
	w.hash.Write(p[:n])
	w.offset += int64(n)
	w.updated = time.Now()
	if w.offset-w.begun >= writebackEvery {
		disk.StartWriteback(w.data, w.begun, w.offset-w.begun)
		w.begun = w.offset
	}
	if w.offset-w.saved >= saveEvery {
		w.saveState()
	}
	if err != nil {
		return n, fmt.Errorf("ingest %s: %w", w.ref, err)
	}
	return n, nil
}

// fits returns DataLoss if n more bytes would exceed the expected size.
func (w *Writer) fits(n int64) error {
	if w.total > 0 && n > w.total-w.offset {
		return mismatch("ingest %s: size mismatch: more than the expected %d bytes", w.ref, w.total)
	}
	return nil
}

// Offset returns the number of bytes stored.
func (w *Writer) Offset() int64 { return w.offset }

// Digest returns the digest of the bytes stored so far.
func (w *Writer) Digest() digest.Digest { return digest.NewDigest(w.alg, w.hash) }

// Status describes the ingest.
func (w *Writer) Status() (Status, error) {
	if w.data == nil {
		return Status{}, errClosed
	}
	return Status{
		Ref: w.ref, Offset: w.offset, Total: w.total, Expected: w.expected,
		StartedAt: w.started, UpdatedAt: w.updated, Active: true,
	}, nil
}

// stored returns the file with the stored bytes.
func (w *Writer) stored() (name string, f *os.File) {
	if w.linked != nil {
		return linkFile, w.linked
	}
	return dataFile, w.data
}

// Truncate removes what is stored; size must be 0.
func (w *Writer) Truncate(size int64) error {
	if size != 0 {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "truncate to %d: the size must be 0", size)
	}
	if w.data == nil {
		return errClosed
	}
	w.unlink()
	// Remove the saved state first: it must not outlive the data.
	if err := w.dropState(); err != nil {
		return err
	}
	if err := w.data.Truncate(0); err != nil {
		return err
	}
	w.offset, w.saved, w.begun, w.hash, w.updated = 0, 0, 0, newHash(w.alg), time.Now()
	return nil
}

// Close unlocks the ingest and keeps its data for a later writer. After Commit or a first Close it does nothing.
func (w *Writer) Close() error {
	if w.lock == nil {
		return nil
	}
	var err error
	linked := w.linked != nil
	w.unlink()
	if w.data != nil && w.hash != nil {
		if w.offset > w.saved && !linked {
			w.saveState()
		}
		// The kernel's clock for mtime is coarser than time.Now.
		if err = w.s.Tree.Touch(w.file(dataFile), w.updated); errors.Is(err, fs.ErrNotExist) {
			err = nil // a failed commit has renamed it
		}
	}
	w.release()
	if err != nil {
		return fmt.Errorf("close ingest %s: %w", w.ref, err)
	}
	return nil
}

// Abort closes the writer and removes the ingest.
func (w *Writer) Abort() error {
	if w.lock == nil {
		return nil
	}
	err := w.remove()
	if err != nil {
		return fmt.Errorf("abort %s: %w", w.ref, err)
	}
	return nil
}

// release closes the data and then the lock. The data goes first, because its lock shows that the ingest is active.
func (w *Writer) release() {
	if w.data != nil {
		disk.Release(w.data)
		w.data = nil
	}
	if w.lock != nil {
		disk.Release(w.lock)
		w.lock = nil
	}
}

func (w *Writer) remove() error {
	w.unlink()
	var open []*os.File
	if w.data != nil {
		open = append(open, w.data)
	}
	err := w.s.removeIngest(w.dir, w.lock, open...)
	w.data, w.lock = nil, nil
	return err
}

// Commit verifies the blob, makes it durable and publishes it under its digest, with labels if any are given. size and
// expected are checked in addition to those given to [Store.Writer]; 0 and "" mean unknown. After a nil error the blob
// survives a power failure.
//
// DataLoss: size or digest differ; the data is kept, and the writer stays open for Truncate, Abort or Close.
// AlreadyExists: the blob is stored already and was freshened; the ingest is removed and the writer closed.
func (w *Writer) Commit(ctx context.Context, size int64, expected digest.Digest, labels map[string]string) error {
	if w.data == nil {
		return errClosed
	}
	if expected == "" {
		expected = w.expected
	} else if err := Validate(expected); err != nil {
		return err
	}
	if err := checkLabels(labels); err != nil {
		return err
	}
	dgst, err := w.verify(ctx, size, expected)
	if err != nil {
		name := string(expected)
		if name == "" {
			name = w.ref
		}
		return fmt.Errorf("commit %s: %w", name, err)
	}
	found, err := w.s.stored(ctx, dgst, w.offset)
	if err != nil {
		return err
	}
	if found {
		_ = w.remove()
		return errExists(dgst)
	}
	if err := w.publish(ctx, dgst, labels); err != nil {
		return fmt.Errorf("commit %s: %w", dgst, err)
	}
	events.Append(w.s.Root(), events.Event{Topic: "/content/create", Digest: string(dgst), Size: w.offset, Labels: labels})
	// The blob is published, so it doesn't matter whether the rest of the ingest can be removed.
	_ = w.remove()
	return nil
}

func (w *Writer) verify(ctx context.Context, size int64, expected digest.Digest) (digest.Digest, error) {
	_, stored := w.stored()
	fi, err := stored.Stat()
	if err != nil {
		return "", err
	}
	if fi.Size() != w.offset {
		return "", mismatch("another process changed the data: it has %d bytes, but %d were written", fi.Size(), w.offset)
	}
	for _, want := range []int64{size, w.total} {
		if want > 0 && want != w.offset {
			return "", mismatch("size mismatch: got %d bytes, expected %d", w.offset, want)
		}
	}
	dgst := w.Digest()
	if expected != "" && expected.Algorithm() != w.alg {
		h := newHash(expected.Algorithm())
		if err := hashRange(ctx, h, stored, 0, w.offset); err != nil {
			return "", err
		}
		dgst = digest.NewDigest(expected.Algorithm(), h)
	}
	if expected != "" && dgst != expected {
		return "", mismatch("digest mismatch: got %s", dgst)
	}
	return dgst, nil
}

// publish publishes the blob. distkit-layout(5), BLOBS, gives the order of the steps and the reasons.
func (w *Writer) publish(ctx context.Context, dgst digest.Digest, labels map[string]string) error {
	now := time.Now()
	name, stored := w.stored()
	err := stored.Chmod(0o444)
	copied := errors.Is(err, unix.EPERM) // another user's file, and it would remain so
	if err != nil && !copied {
		return err
	}
	if err := w.s.Tree.Touch(w.file(name), now); err != nil {
		return err
	}
	if err := stored.Sync(); err != nil {
		// The kernel reports a failed write-back once, and may then consider the pages clean: none of the stored data
		// can be trusted.
		return errors.Join(err, w.Truncate(0))
	}
	// If a blob of this name exists it is damaged, or [Store.stored] would have found it. A process that holds its lock
	// may be about to delete it.
	old, err := w.s.lockBlob(ctx, dgst)
	if err == nil {
		defer disk.Release(old)
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	if len(labels) > 0 {
		if err := w.s.writeLabels(dgst, labels, now); err != nil {
			return err
		}
	}
	from, target := w.file(name), layout.BlobName(dgst)
	if !copied {
		err = w.s.Tree.Rename(from, target)
		if errors.Is(err, fs.ErrNotExist) {
			if err = w.s.Tree.MakeDir(path.Dir(target)); err == nil {
				err = w.s.Tree.Rename(from, target)
			}
		}
	}
	if copied || errors.Is(err, unix.EXDEV) { // EXDEV: blobs/ is on another file system
		from, err = layout.WriteTemp(w.s.Tree, path.Dir(target), func(f *os.File) error { return w.copyTo(ctx, f, dgst) })
		if err == nil {
			if err = w.s.Tree.Rename(from, target); err != nil {
				_ = w.s.Tree.Remove(from)
			}
		}
	}
	if err != nil {
		return err
	}
	if err := w.s.Tree.SyncDir(path.Dir(target)); err != nil {
		return fmt.Errorf("sync %s: %w", path.Dir(target), disk.Cause(err))
	}
	return nil
}

// copyTo copies the stored data to another file, and verifies the digest of the copy.
func (w *Writer) copyTo(ctx context.Context, out *os.File, dgst digest.Digest) error {
	_, stored := w.stored()
	h := newHash(dgst.Algorithm())
	if err := Copy(ctx, io.MultiWriter(out, h), io.NewSectionReader(stored, 0, w.offset)); err != nil {
		return err
	}
	if got := digest.NewDigest(dgst.Algorithm(), h); got != dgst {
		return mismatch("read stored data: digest mismatch: got %s", got)
	}
	return out.Chmod(0o444)
}
