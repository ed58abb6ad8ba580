package content

import (
	"context"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
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

const (
	// chunk is the unit of copying: large enough that system calls don't count, small
	// enough that several fit into a cache.
	chunk = 256 << 10
	// saveEvery bounds what a resume after a kill has to hash again.
	saveEvery = 64 << 20
	// maxState bounds the file of a hash's state, in bytes.
	maxState = 64 << 10
)

// Writer is an ingest that is open and locked. It is not for concurrent use.
type Writer struct {
	s        *Store
	dir      string
	lock     *os.File
	data     *os.File
	linked   *os.File // another store's blob, stored by a hard link instead of in data; nil if there is none
	ref      string
	expected digest.Digest
	total    int64
	offset   int64
	saved    int64 // offset of the stored hash state
	alg      digest.Algorithm
	hash     hash.Hash
	started  time.Time
	updated  time.Time
}

// hashState is the stored state of a hash at an offset of data: distkit-layout(5), INGESTS.
type hashState struct {
	Algorithm digest.Algorithm `json:"algorithm"`
	Offset    int64            `json:"offset"`
	Boot      string           `json:"boot"`
	State     []byte           `json:"state"`
}

// file is the name of one of the ingest's files in the store's tree.
func (w *Writer) file(name string) string { return path.Join(w.dir, name) }

// write replaces one of the ingest's small files. What is no regular file is removed before.
func (w *Writer) write(name, text string) error {
	err := w.s.Tree.WriteFile(w.file(name), []byte(text), 0o666)
	if errdefs.IsFailedPrecondition(err) {
		if err = w.s.Tree.Remove(w.file(name)); err == nil {
			err = w.s.Tree.WriteFile(w.file(name), []byte(text), 0o666)
		}
	}
	return err
}

// open begins or resumes the ingest whose lock is held. Whatever it finds, torn or strange,
// it makes an ingest of: what can't be trusted is thrown away.
func (w *Writer) open(ctx context.Context) error {
	tree := w.s.Tree
	data, err := tree.OpenFile(w.file(dataFile), os.O_RDWR|os.O_CREATE, 0o666)
	if errors.Is(err, fs.ErrPermission) {
		// A commit died after it had made the data read-only.
		if read, rerr := tree.Open(w.file(dataFile)); rerr == nil {
			if read.Chmod(0o644) == nil {
				data, err = tree.OpenFile(w.file(dataFile), os.O_RDWR, 0)
			}
			_ = read.Close()
		}
	}
	if errdefs.IsFailedPrecondition(err) { // no regular file
		if err = tree.Remove(w.file(dataFile)); err == nil {
			data, err = tree.OpenFile(w.file(dataFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
		}
	}
	if err != nil {
		return err
	}
	w.data = data
	// The lock on data excludes nobody: it tells those who list ingests that this one is
	// alive, without their ever touching the lock that excludes.
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
	foreign := err != nil ||
		old.Expected != "" && w.expected != "" && old.Expected != w.expected ||
		old.Total > 0 && w.total > 0 && old.Total != w.total
	// What an earlier writer expected beyond what this one does is not this one's business.
	w.started = time.Now()
	if !foreign {
		w.started = old.StartedAt
	}
	w.alg = digest.SHA256
	if w.expected != "" {
		w.alg = w.expected.Algorithm()
	}
	w.offset, w.updated = fi.Size(), fi.ModTime()
	resumed := !foreign && w.offset > 0 && (w.total == 0 || w.offset <= w.total)
	if resumed {
		if resumed, err = w.rehash(ctx); err != nil {
			return err
		}
	}
	if !resumed {
		if err := w.Truncate(0); err != nil {
			return err
		}
	}
	if foreign || old.Ref != w.ref || old.Total != w.total || old.Expected != w.expected {
		if err := w.describe(); err != nil {
			return err
		}
	}
	if !resumed && w.expected == "" {
		w.saveState() // the boot ID, for rehash
	}
	return nil
}

// describe writes the small files that say what the ingest is of.
func (w *Writer) describe() error {
	for _, f := range []struct{ name, text string }{
		{startedFile, w.started.Format(time.RFC3339Nano)},
		{totalFile, strconv.FormatInt(w.total, 10)},
		{expectedFile, string(w.expected)},
		{refFile, w.ref},
	} {
		if f.text == "" || f.text == "0" {
			if err := w.s.Tree.Remove(w.file(f.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
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

// rehash brings the running hash to the end of the data, from the stored state if that can
// be believed. It is false if the data can't be used: after another boot any of it may be
// lost, which nothing would show where no digest is expected.
func (w *Writer) rehash(ctx context.Context) (bool, error) {
	from, ok := w.loadState()
	if !ok {
		if w.expected == "" {
			return false, nil
		}
		// It must go before anything is written, lest a later resume believe it.
		if err := w.dropState(); err != nil {
			return false, err
		}
		w.hash, from = newHash(w.alg), 0
	}
	w.saved = from
	return true, hashRange(ctx, w.hash, w.data, from, w.offset)
}

// hashRange hashes the bytes [from, to) of a file.
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
			return fmt.Errorf("read back what is stored: %w", err)
		}
	}
	return nil
}

func (w *Writer) loadState() (offset int64, ok bool) {
	b, err := w.s.Tree.ReadFile(w.file(stateFile), maxState)
	if err != nil {
		return 0, false
	}
	var st hashState
	if json.Unmarshal(b, &st) != nil || st.Algorithm != w.alg || st.Offset > w.offset ||
		st.Boot == "" || st.Boot != bootID() {
		return 0, false
	}
	h := newHash(w.alg)
	if h.(encoding.BinaryUnmarshaler).UnmarshalBinary(st.State) != nil {
		return 0, false
	}
	w.hash = h
	return st.Offset, true
}

// saveState stores the hash's state by rename. It is a short cut for the next resume alone,
// and never trusted after another boot: nothing is synced, and failure costs time only.
func (w *Writer) saveState() {
	state, err := w.hash.(encoding.BinaryMarshaler).MarshalBinary()
	if err != nil {
		return
	}
	b, err := json.Marshal(hashState{w.alg, w.offset, bootID(), state})
	if err != nil {
		return
	}
	tmp := stateFile + ".tmp"
	if w.write(tmp, string(b)+"\n") != nil || w.s.Tree.Rename(w.file(tmp), w.file(stateFile)) != nil {
		_ = w.s.Tree.Remove(w.file(tmp))
		return
	}
	w.saved = w.offset
}

func (w *Writer) dropState() error {
	if err := w.s.Tree.Remove(w.file(stateFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

var errClosed = errclass.As(errors.New("writer is closed"), errdefs.ErrFailedPrecondition)

// Write appends. What would go beyond the expected size is refused before it is stored:
// DataLoss.
func (w *Writer) Write(p []byte) (int, error) {
	if w.data == nil {
		return 0, errClosed
	}
	if w.linked != nil {
		return 0, errclass.Errorf(errdefs.ErrFailedPrecondition, "ingest %s: what CloneFrom has stored can't be appended to", w.ref)
	}
	if err := w.fits(int64(len(p))); err != nil {
		return 0, err
	}
	n, err := w.data.WriteAt(p, w.offset)
	w.hash.Write(p[:n])
	w.offset += int64(n)
	w.updated = time.Now()
	if w.offset-w.saved >= saveEvery {
		w.saveState()
	}
	if err != nil {
		return n, fmt.Errorf("ingest %s: %w", w.ref, err)
	}
	return n, nil
}

// fits is DataLoss if so many bytes more are not expected.
func (w *Writer) fits(n int64) error {
	if w.total > 0 && n > w.total-w.offset {
		return mismatch(fmt.Errorf("ingest %s: size mismatch: more than the expected %d bytes", w.ref, w.total))
	}
	return nil
}

// Offset is the number of bytes stored.
func (w *Writer) Offset() int64 { return w.offset }

// Digest is the digest of what is stored so far.
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

// Stored opens what is stored for reading, from its beginning. It grows with the ingest, and
// stays valid after Commit and Close.
func (w *Writer) Stored() (*os.File, error) {
	if w.data == nil {
		return nil, errClosed
	}
	name, _ := w.stored()
	return w.s.Tree.Open(w.file(name))
}

// stored is the file that holds what is stored.
func (w *Writer) stored() (name string, f *os.File) {
	if w.linked != nil {
		return linkFile, w.linked
	}
	return dataFile, w.data
}

// Truncate begins anew; only size 0 is possible.
func (w *Writer) Truncate(size int64) error {
	if size != 0 {
		return errclass.As(fmt.Errorf("truncate to %d: only to 0 is possible", size), errdefs.ErrInvalidArgument)
	}
	if w.data == nil {
		return errClosed
	}
	w.unlink()
	// The state goes first: it must not outlive the bytes that it is of.
	if err := w.dropState(); err != nil {
		return err
	}
	if err := w.data.Truncate(0); err != nil {
		return err
	}
	w.offset, w.saved, w.hash, w.updated = 0, 0, newHash(w.alg), time.Now()
	return nil
}

// Close keeps what is stored for a later writer of the same ref, and unlocks it. After
// Commit, or a second time, it does nothing.
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
		err = w.write(updatedFile, w.updated.Format(time.RFC3339Nano)+"\n")
		// What write(2) leaves there comes from a coarser clock than ours.
		err = errors.Join(err, w.s.Tree.Touch(w.file(dataFile), w.updated))
	}
	w.release()
	if err != nil {
		return fmt.Errorf("close ingest %s: %w", w.ref, err)
	}
	return nil
}

// Abort closes the writer and throws away what is stored.
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

// release gives up what is open, the mark of life before the lock.
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

// Commit verifies the blob, makes it durable and publishes it under its digest, with labels
// if any are given. Size and digest add to what Writer was told; 0 and "" mean that they are
// not known. When it returns nil the blob survives a power failure.
//
// DataLoss: size or digest differ; all is kept, and the writer stays open to Truncate, Abort
// or Close. AlreadyExists: the blob is there; it was freshened, the ingest is gone and the
// writer closed.
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
	// What is left of the ingest is not seen by anybody, whether or not it can be removed.
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
		return "", mismatch(fmt.Errorf("data was changed by someone else: %d bytes, %d were written", fi.Size(), w.offset))
	}
	for _, want := range []int64{size, w.total} {
		if want > 0 && want != w.offset {
			return "", mismatch(fmt.Errorf("size mismatch: got %d bytes, expected %d", w.offset, want))
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
		return "", mismatch(fmt.Errorf("digest mismatch: got %s", dgst))
	}
	return dgst, nil
}

// publish: distkit-layout(5), BLOBS, tells the order of these steps and why.
func (w *Writer) publish(ctx context.Context, dgst digest.Digest, labels map[string]string) error {
	now := time.Now()
	name, stored := w.stored()
	err := stored.Chmod(0o444)
	copied := errors.Is(err, unix.EPERM) // another user of the group has begun it, whose file it would stay
	if err != nil && !copied {
		return err
	}
	if err := w.s.Tree.Touch(w.file(name), now); err != nil {
		return err
	}
	if err := stored.Sync(); err != nil {
		// The kernel reports a failed write-back once and may then call the pages clean:
		// nothing stored so far can be relied on.
		return errors.Join(err, w.Truncate(0))
	}
	// A blob of that name is damaged, or stored would have found it. Whoever has its lock may be about to delete it.
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
	if copied || errors.Is(err, unix.EXDEV) { // or blobs/ is another file system
		from, err = layout.WriteAside(w.s.Tree, path.Dir(target), func(f *os.File) error { return w.copyTo(ctx, f, dgst) })
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

// copyTo copies what is stored to a file of another file system, and verifies what it reads for that.
func (w *Writer) copyTo(ctx context.Context, out *os.File, dgst digest.Digest) error {
	_, stored := w.stored()
	h := newHash(dgst.Algorithm())
	if _, err := Copy(ctx, io.MultiWriter(out, h), io.NewSectionReader(stored, 0, w.offset)); err != nil {
		return err
	}
	if got := digest.NewDigest(dgst.Algorithm(), h); got != dgst {
		return mismatch(fmt.Errorf("read back what is stored: digest mismatch: got %s", got))
	}
	return out.Chmod(0o444)
}
