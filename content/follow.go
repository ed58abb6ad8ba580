package content

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// heldBack is how much of the end is written only once the whole is verified: enough that a reader of an
	// archive or a compressed stream misses its end.
	heldBack = 64 << 10
	// deadAfter is how long an ingest may have no writer before it counts as left behind. A new writer is not seen at once:
	// it locks the ingest first, and then its data, whose lock shows that it is there.
	deadAfter = time.Second
	// A follower looks again after an event, and without one after a pause that grows from minPause to maxPause.
	minPause = 2 * time.Millisecond
	maxPause = 200 * time.Millisecond
)

// Follow writes a blob to out: one that is stored, or one that another process is ingesting, as its bytes arrive. It takes
// no lock that a writer waits for. The last 64 KiB are written once the blob is stored and what was written of it hashes to
// the digest. While wait, if it is not nil, returns true, it also waits for an ingest that has not begun yet, or that has lost
// its writer.
//
// NotFound: the blob is not stored, and no process ingests it. Aborted: its ingest was thrown away or has lost its
// writer. DataLoss: what was written is not how the blob begins, because the ingest began anew with other content.
func (s *Store) Follow(ctx context.Context, dgst digest.Digest, out io.Writer, wait func() bool) error {
	if err := Validate(dgst); err != nil {
		return err
	}
	f := follower{s: s, dgst: dgst, out: out, dir: ingestDir(string(dgst)), hash: newHash(dgst.Algorithm())}
	defer f.forget()
	if err := f.run(ctx, wait); err != nil {
		return fmt.Errorf("follow %s: %w", dgst, err)
	}
	return nil
}

type follower struct {
	s    *Store
	dgst digest.Digest
	out  io.Writer
	sent int64
	hash hash.Hash // of what was sent
	buf  []byte

	dir   string   // of the blob's ingest
	data  *os.File // of the ingest; nil: none was found
	watch *watch
}

func (f *follower) run(ctx context.Context, wait func() bool) error {
	pause, found := minPause, false
	var orphaned time.Time // since when the ingest has had no writer
	for {
		blob, err := f.s.File(f.dgst)
		if err == nil {
			defer blob.Close()
			return f.finish(ctx, blob)
		}
		if !errdefs.IsNotFound(err) {
			return err
		}
		if f.data == nil {
			if err := f.find(); err != nil {
				return err
			}
		}
		before := f.sent
		if f.data != nil {
			found = true
			fi, err := f.data.Stat()
			if err != nil {
				return err
			}
			if err := f.send(ctx, f.data, fi.Size()-heldBack); err != nil {
				return err
			}
			if !f.s.Tree.Names(path.Join(f.dir, dataFile), f.data) {
				f.forget() // it was published, or thrown away
			}
		}
		if f.data == nil {
			if _, err := f.s.Path(f.dgst); err == nil {
				continue // published since it was looked for
			}
		}
		switch {
		case f.sent > before:
			pause, orphaned = minPause, time.Time{}
			continue
		case f.data != nil && locked(f.data), wait != nil && wait():
			orphaned = time.Time{}
		case wait != nil:
			wait = nil // look once more: the ingest may have begun since the last look
			continue
		case !found:
			return errclass.Errorf(errdefs.ErrNotFound, "it is not stored, and no process ingests it")
		case orphaned.IsZero():
			orphaned = time.Now()
		case time.Since(orphaned) > deadAfter:
			return errclass.Errorf(errdefs.ErrAborted, "its ingest ended without storing it")
		}
		happened, err := f.await(ctx, pause)
		if err != nil {
			return err
		}
		if pause = min(2*pause, maxPause); happened {
			pause = minPause
		}
	}
}

// find opens the data of the blob's ingest, if there is one.
func (f *follower) find() error {
	data, err := f.s.Tree.Open(path.Join(f.dir, dataFile))
	if errors.Is(err, fs.ErrNotExist) || errdefs.IsFailedPrecondition(err) {
		return nil // there is none, or what is there is no ingest
	}
	if err != nil {
		return err
	}
	f.forget()
	f.data = data
	return nil
}

// forget closes the ingest.
func (f *follower) forget() {
	if f.data != nil {
		_ = f.data.Close()
		f.data = nil
	}
	f.watch.close()
	f.watch = nil
}

// send writes the bytes of a file that were not sent yet, up to an offset. It stops early if the file has become shorter.
func (f *follower) send(ctx context.Context, from *os.File, to int64) error {
	if f.buf == nil && f.sent < to {
		f.buf = make([]byte, chunk)
	}
	for f.sent < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := from.ReadAt(f.buf[:min(chunk, to-f.sent)], f.sent)
		if err != nil && err != io.EOF {
			return disk.Cause(err)
		}
		if n == 0 {
			return nil
		}
		if err := f.write(f.buf[:n]); err != nil {
			return err
		}
	}
	return nil
}

func (f *follower) write(p []byte) error {
	f.hash.Write(p)
	f.sent += int64(len(p))
	_, err := f.out.Write(p)
	return err
}

// finish writes the rest of a stored blob. Nothing is hashed unless something was sent before the blob was stored.
func (f *follower) finish(ctx context.Context, blob *File) error {
	if f.sent == 0 {
		n, err := io.Copy(f.out, blob.File)
		if err == nil && n != blob.Size() {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if err := f.send(ctx, blob.File, blob.Size()-heldBack); err != nil {
		return err
	}
	// Another process may have made the file longer: no more than this is read into memory.
	rest, err := io.ReadAll(io.NewSectionReader(blob.File, f.sent, min(blob.Size()-f.sent, heldBack)))
	if err != nil {
		return disk.Cause(err)
	}
	f.hash.Write(rest)
	if digest.NewDigest(f.dgst.Algorithm(), f.hash) != f.dgst {
		return mismatch("digest mismatch: the content differs from what was written of it before")
	}
	_, err = f.out.Write(rest)
	return err
}

// await waits for a change of the ingest, or of the store's ingests and blobs if there is none yet, for at most a pause.
func (f *follower) await(ctx context.Context, pause time.Duration) (happened bool, err error) {
	if f.watch == nil {
		// What happened before the watch began is seen by looking at once.
		if f.watch = f.begin(); f.watch != nil {
			return true, nil
		}
	}
	if f.watch != nil {
		return f.watch.wait(ctx, pause)
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// begin watches the ingest's data, else the directories in which an ingest or the blob would appear. It returns nil where
// nothing can be watched.
func (f *follower) begin() *watch {
	if f.data != nil {
		return newWatch(f.data)
	}
	var dirs []*os.File
	for _, name := range []string{layout.Ingest, path.Dir(layout.BlobName(f.dgst)), ocispec.ImageBlobsDir} {
		if dir, err := f.s.Tree.OpenDir(name); err == nil {
			defer dir.Close()
			dirs = append(dirs, dir)
		}
	}
	if len(dirs) < 3 {
		return nil // not all of the store has been made
	}
	return newWatch(dirs...)
}
