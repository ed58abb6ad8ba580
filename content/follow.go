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
	// heldBack is how many bytes at the end are not written before the blob is verified. That is enough that the reader
	// of an archive or a compressed stream notices that the end is missing.
	heldBack = 64 << 10
	// deadAfter is how long an ingest may lack a writer before Follow gives up. A new writer doesn't show immediately:
	// it locks the ingest before it locks the data, and only the data's lock shows the writer.
	deadAfter = time.Second
	// The bounds of the interval between two checks. It doubles while nothing happens; a file system event ends it
	// early.
	minPause = 2 * time.Millisecond
	maxPause = 200 * time.Millisecond
)

// Follow writes a blob to out as its bytes arrive: a stored one, or one that another process is ingesting. It takes no
// lock that a writer would wait for. It holds back the last 64 KiB until the blob is stored and all that it wrote
// hashes to the digest.
//
// If wait is not nil, Follow also waits, as long as wait returns true, for an ingest that hasn't begun yet or has lost
// its writer.
//
// NotFound: the blob isn't stored, and no process is ingesting it. Aborted: the ingest was removed or has lost its
// writer. DataLoss: the blob doesn't begin with what was written, because the ingest started over with other content.
func (s *Store) Follow(ctx context.Context, dgst digest.Digest, out io.Writer, wait func() bool) error {
	if err := Validate(dgst); err != nil {
		return err
	}
	f := follower{s: s, dgst: dgst, out: out, dir: ingestDir(string(dgst)), hash: newHash(dgst.Algorithm())}
	defer f.closeIngest()
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
	hash hash.Hash // of the bytes sent
	buf  []byte

	dir   string   // the directory of the blob's ingest
	data  *os.File // the ingest's data; nil if no ingest was found
	watch *watch
}

func (f *follower) run(ctx context.Context, wait func() bool) error {
	pause, found := minPause, false
	var orphaned time.Time // since when the ingest has no writer; zero if it has one
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
			if err := f.openIngest(); err != nil {
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
				f.closeIngest() // it was published or removed
			}
		}
		if f.data == nil {
			if _, err := f.s.Path(f.dgst); err == nil {
				continue // published since the check above
			}
		}
		switch {
		case f.sent > before:
			pause, orphaned = minPause, time.Time{}
			continue
		case f.data != nil && locked(f.data), wait != nil && wait():
			orphaned = time.Time{}
		case wait != nil:
			wait = nil // check once more: the ingest may have begun since the last check
			continue
		case !found:
			return errclass.Errorf(errdefs.ErrNotFound, "not stored, and no process is ingesting it")
		case orphaned.IsZero():
			orphaned = time.Now()
		case time.Since(orphaned) > deadAfter:
			return errclass.Errorf(errdefs.ErrAborted, "the ingest ended without storing it")
		}
		event, err := f.await(ctx, pause)
		if err != nil {
			return err
		}
		if pause = min(2*pause, maxPause); event {
			pause = minPause
		}
	}
}

// openIngest opens the data of the blob's ingest, if there is one.
func (f *follower) openIngest() error {
	data, err := f.s.Tree.Open(path.Join(f.dir, dataFile))
	if errors.Is(err, fs.ErrNotExist) || errdefs.IsFailedPrecondition(err) {
		return nil // no ingest, or its data is not a regular file
	}
	if err != nil {
		return err
	}
	f.closeIngest()
	f.data = data
	return nil
}

// closeIngest closes the ingest's data and the watch.
func (f *follower) closeIngest() {
	if f.data != nil {
		_ = f.data.Close()
		f.data = nil
	}
	f.watch.close()
	f.watch = nil
}

// send writes the bytes of a file from f.sent up to offset to. It stops early if the file has become shorter.
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

// finish writes the rest of a stored blob. If nothing was sent before the blob was stored it needs no hashing.
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
	// Another process may have extended the file, so bound what is read into memory.
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

// await waits for an event in the ingest, or, without an ingest, in the directories of ingests and blobs. It waits no
// longer than pause.
func (f *follower) await(ctx context.Context, pause time.Duration) (event bool, err error) {
	if f.watch == nil {
		// Return at once, so that the caller checks for what happened before the watch began.
		if f.watch = f.startWatch(); f.watch != nil {
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

// startWatch watches the ingest's data, or, without an ingest, the directories in which an ingest or the blob would
// appear. It returns nil if they can't be watched.
func (f *follower) startWatch() *watch {
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
		return nil // one doesn't exist yet
	}
	return newWatch(dirs...)
}
