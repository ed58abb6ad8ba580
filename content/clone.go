package content

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

// CloneFrom stores the content of r without copying it, and hashes it. It can do so if r is a regular file that is
// positioned at its beginning. ok is false if the content has to be copied; then nothing is stored. Afterwards r is
// positioned at its end.
//
// An *os.File is stored as a reflink, which later writes to the file don't change. If reflinks are not available, a
// *[File] is stored as a hard link, provided that no other user can change it: the file is read-only, and it and its
// directory belong to this user. Write can't append to a hard link; Truncate, Close and Abort remove it.
//
// The error is FailedPrecondition if the ingest holds bytes already, and DataLoss if the file is larger than expected;
// then nothing is stored.
func (w *Writer) CloneFrom(ctx context.Context, r io.Reader) (ok bool, err error) {
	if w.data == nil {
		return false, errClosed
	}
	if w.offset > 0 {
		return false, errclass.Errorf(errdefs.ErrFailedPrecondition, "ingest %s: it already holds %d bytes", w.ref, w.offset)
	}
	f, _ := r.(*os.File)
	blob, isBlob := r.(*File)
	if isBlob {
		f = blob.File
	}
	if f == nil {
		return false, nil
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() || fi.Size() == 0 {
		return false, nil
	}
	if offset, err := f.Seek(0, io.SeekCurrent); err != nil || offset != 0 {
		return false, nil
	}
	if disk.Clone(w.data, f) != nil && !(isBlob && w.link(f)) {
		return false, w.data.Truncate(0) // undoes a reflink that failed half-way
	}
	if err := w.adopt(ctx); err != nil {
		return false, errors.Join(err, w.Truncate(0))
	}
	_, err = f.Seek(0, io.SeekEnd)
	return true, err
}

// adopt hashes the content that was cloned or linked. It reads the ingest's file, because the original may have changed
// in the meantime.
func (w *Writer) adopt(ctx context.Context) error {
	_, stored := w.stored()
	fi, err := stored.Stat()
	if err != nil {
		return err
	}
	if err := w.fits(fi.Size()); err != nil {
		return err
	}
	if err := hashRange(ctx, w.hash, stored, 0, fi.Size()); err != nil {
		return err
	}
	w.offset = fi.Size()
	return nil
}

// link stores another store's blob as a hard link in the ingest. It returns false if that fails, or if another user
// could change the blob.
func (w *Writer) link(blob *os.File) bool {
	file, err := blob.Stat()
	dir, derr := os.Lstat(filepath.Dir(blob.Name()))
	if err != nil || derr != nil || file.Mode() != 0o444 || !isOurs(file) || !isOurs(dir) {
		return false
	}
	tree := w.s.Tree
	_ = tree.Remove(w.file(linkFile)) // left by a crash
	if tree.LinkFile(blob, w.file(linkFile)) != nil {
		return false
	}
	f, err := tree.Open(w.file(linkFile))
	if err != nil {
		_ = tree.Remove(w.file(linkFile))
		return false
	}
	w.linked = f
	return true
}

// isOurs reports whether a file belongs to this user and no other user can write to it.
func isOurs(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid() && fi.Mode()&0o022 == 0
}

// unlink removes the ingest's hard link, if it has one. The blob in the other store stays.
func (w *Writer) unlink() {
	if w.linked == nil {
		return
	}
	_ = w.linked.Close()
	_ = w.s.Tree.Remove(w.file(linkFile))
	w.linked = nil
}
